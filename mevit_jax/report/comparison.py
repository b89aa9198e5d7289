"""Comparison of two evaluations as text."""

from typing import Any

_METRICS = {'top1': 'top-1', 'top5': 'top-5', 'mean_class': 'mean class'}


def format_comparison(comparison: dict[str, Any], videos: int) -> str:
  """Formats the result of `compare_evaluations` as text.

  Args:
    comparison: result of `compare_evaluations`.
    videos: maximum number of changed videos to list in each direction.
  """
  dataset, counts = comparison['dataset'], comparison['mcnemar_top1']
  lines = [
    f'A  {comparison["a"]}',
    f'B  {comparison["b"]}',
    f'{comparison["videos"]:,} videos of {dataset["name"]}/{dataset["split"]}, fingerprint '
    f'{dataset["fingerprint"][:12]}; {comparison["excluded"]:,} excluded (unreadable in A or B, or unlabeled)',
    '',
    f'{"":12}{"A":>10}{"B":>10}{"B - A":>10}   95 % CI (paired bootstrap over videos)',
    *(_format_metric(name, comparison[key]) for key, name in _METRICS.items()),
    '',
    'Ensemble of A and B (mean of probabilities): '
    + ', '.join(f'{name} {100 * comparison["ensemble"][key]:.2f} %' for key, name in _METRICS.items()),
    f'{100 * comparison["same_prediction"]:.1f} % have the same prediction; {counts["correct_to_wrong"]} correct only '
    f"in A, {counts['wrong_to_correct']} correct only in B (McNemar's exact test: p = {counts['p']:.2g})",
    *_explain_disagreement(comparison),
    *_format_videos('Correct only in A', comparison['correct_to_wrong'][:videos]),
    *_format_videos('Correct only in B', comparison['wrong_to_correct'][:videos]),
    '',
    'Differences in settings (A -> B):',
    *(f'  {line}' for line in comparison['differences'] or ['none']),
  ]
  return '\n'.join(lines)


def _explain_disagreement(comparison: dict[str, Any]) -> list[str]:
  """Explains an interval of top-1 and a p value that disagree about whether the models differ, as for few videos."""
  (low, high), counts = comparison['top1']['interval'], comparison['mcnemar_top1']
  excludes_zero, changed = low > 0 or high < 0, counts['correct_to_wrong'] + counts['wrong_to_correct']
  if excludes_zero == (counts['p'] < 0.05):
    return []
  return [
    f'The interval of top-1 {"excludes" if excludes_zero else "includes"} 0, but p = {counts["p"]:.2g}: only {changed} '
    f'of {comparison["videos"]:,} videos changed, too few for the bootstrap. The exact test decides: '
    f'{"the difference may be chance" if excludes_zero else "the models differ"}.'
  ]


def _format_metric(name: str, metric: dict[str, Any]) -> str:
  a, b, difference = (100 * metric[key] for key in ('a', 'b', 'difference'))
  low, high = (100 * x for x in metric['interval'])
  return f'{name:12}{a:8.2f} %{b:8.2f} %{difference:+10.2f}   {low:+.2f} to {high:+.2f}'


def _format_videos(title: str, videos: list[dict[str, Any]]) -> list[str]:
  if not videos:
    return []
  lines = ['', f'{title}:']
  for video in videos:
    a, b = (f'{video[key]["prediction"]} {100 * video[key]["confidence"]:.0f} %' for key in ('a', 'b'))
    lines.append(f'  {video["id"]}  label {video["label"]}: A {a}; B {b}')
  return lines

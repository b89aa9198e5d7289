"""Official split files of UCF101 and HMDB51, which `video_folder` reads."""

from pathlib import Path

import pytest

from mevit_jax.datasets.builders import video_folder
from mevit_jax.errors import UserError
from tests.helpers.trees import make_tree, shuffled_listing, write_lines

UCF = ('ApplyLipstick', 'HandstandPushups', 'Archery')  # not in alphabetical order
UCF_TRAIN = [f'{name}/v_{name}_g{group:02d}_c01.avi {i + 1}' for i, name in enumerate(UCF) for group in (8, 9)]
UCF_TEST = [f'{name}/v_{name}_g01_c01.avi' for name in UCF]


def ucf(folder: Path) -> Path:
  """Writes UCF101's split files; the second fold exchanges train and test."""
  write_lines(folder / 'classInd.txt', *(f'{i + 1} {name}' for i, name in enumerate(UCF)))
  for kind, lines in (('train', UCF_TRAIN), ('test', UCF_TEST)):
    write_lines(folder / f'{kind}list01.txt', *lines)
    write_lines(folder / f'{"test" if kind == "train" else "train"}list02.txt', *lines)
  return folder


UCF_VIDEOS = [line.split()[0] for line in UCF_TRAIN + UCF_TEST]


@pytest.mark.parametrize(
  'videos',
  [
    UCF_VIDEOS,
    [f'UCF-101/{video}' for video in UCF_VIDEOS],
    [f'train/{video}' for video in UCF_VIDEOS],
    [Path(video).name for video in UCF_VIDEOS],
    [video.replace('.avi', '.mp4') for video in UCF_VIDEOS],
  ],
)
def test_ucf101_split_files_are_read(tmp_path, videos, monkeypatch):
  root, folder = make_tree(tmp_path / 'videos', *videos), ucf(tmp_path / 'ucfTrainTestlist')
  listing = video_folder.find(root, folder)
  assert listing.class_names == UCF
  assert [(each.id, each.label, each.split) for each in listing.videos] == [
    (f'{name}/v_{name}_g{group:02d}_c01', name, 'validation' if group == 1 else 'train')
    for name in sorted(UCF)
    for group in (1, 8, 9)
  ]
  assert sorted(each.path for each in listing.videos) == sorted(str(root / video) for video in videos)
  assert listing.notes == ['the test list of official split 1 is the validation split']
  with shuffled_listing(monkeypatch, seed=1):
    assert video_folder.find(root, tmp_path / 'ucfTrainTestlist') == listing
  second = {each.id: each.split for each in video_folder.find(root, folder, fold=2).videos}
  assert second == {each.id: {'train': 'validation', 'validation': 'train'}[each.split] for each in listing.videos}


HMDB = {  # 1: train, 2: test, 0: neither
  'brush_hair': {'April_09_brush_hair_u_nm_np1_ba_goo_0.avi': 1, '#20_(x)_brush_hair_h_cm_np1_le_goo_0.avi': 2},
  'wave': {'a.b_wave_u_cm_np1_fr_med_0.avi': 2, 'c&d_wave_u_cm_np1_fr_med_1.avi': 0, 'e_wave_u_cm_np1_fr_med_2.avi': 1},
}


def hmdb(folder: Path) -> Path:
  for label, rows in HMDB.items():
    for fold in (1, 2):
      write_lines(
        folder / f'{label}_test_split{fold}.txt', *(f'{name} {(number * fold) % 3} ' for name, number in rows.items())
      )
  return folder


@pytest.mark.parametrize('where', ['{label}/{name}', 'hmdb51_org/{label}/{name}', '{name}'])
def test_hmdb51_split_files_are_read(tmp_path, where):
  videos = [where.format(label=label, name=name) for label, rows in HMDB.items() for name in rows]
  root, folder = make_tree(tmp_path / 'videos', *videos), hmdb(tmp_path / 'testTrainMulti_7030_splits')
  listing = video_folder.find(root, folder, fold=1)
  assert listing.class_names == ('brush_hair', 'wave')
  assert {each.id: (each.label, each.split) for each in listing.videos} == {
    'brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0': ('brush_hair', 'train'),
    'brush_hair/#20_(x)_brush_hair_h_cm_np1_le_goo_0': ('brush_hair', 'validation'),
    'wave/a.b_wave_u_cm_np1_fr_med_0': ('wave', 'validation'),
    'wave/e_wave_u_cm_np1_fr_med_2': ('wave', 'train'),
  }
  assert {each.path for each in listing.videos} == {str(root / video) for video in videos if 'c&d' not in video}
  assert listing.notes == ['the test list of official split 1 is the validation split']  # not the unused video
  second = {each.id: each.split for each in video_folder.find(root, folder, fold=2).videos}
  assert second['wave/a.b_wave_u_cm_np1_fr_med_0'] == 'train'


def test_missing_and_unlisted_videos_of_split_files_are_reported(tmp_path):
  root = make_tree(tmp_path / 'videos', *UCF_VIDEOS[1:], 'Archery/v_Archery_g77_c01.avi')
  listing = video_folder.find(root, ucf(tmp_path / 'lists'))
  assert [each.id for each in listing.videos if not each.path] == ['ApplyLipstick/v_ApplyLipstick_g08_c01']
  assert '1 videos are not listed and are left out: Archery/v_Archery_g77_c01.avi' in listing.notes


@pytest.mark.parametrize(
  ('name', 'line', 'message'),
  [
    (
      'trainlist01.txt',
      'Archer/v_Archery_g08_c01.avi 3',
      r"line 1: classInd\.txt has no class 'Archer' \(nearest: 'Archery'",
    ),
    ('trainlist01.txt', 'Archery/v_Archery_g08_c01.avi 2', r'line 1: Archery has the number 3 in classInd\.txt, not 2'),
    ('trainlist01.txt', 'v_Archery_g08_c01.avi 3', r'line 1: expected CLASS/NAME\.avi \[NUMBER\]'),
    (
      'trainlist01.txt',
      'Archery/v_Archery_g01_c01.avi 3',
      r'testlist01\.txt, line 3: .* listed twice.*trainlist01\.txt, line 1',
    ),
    ('classInd.txt', '0 Archery', r'line 1: expected 1 CLASS, got: 0 Archery'),
  ],
)
def test_invalid_ucf101_split_files_are_refused(tmp_path, name, line, message):
  root, folder = make_tree(tmp_path / 'videos', *UCF_VIDEOS), ucf(tmp_path / 'lists')
  write_lines(folder / name, line)
  with pytest.raises(UserError, match=message):
    video_folder.find(root, folder)


def test_missing_and_invalid_split_files_are_refused(tmp_path):
  root = make_tree(tmp_path / 'videos', *UCF_VIDEOS)
  with pytest.raises(UserError, match=r'has no trainlist04\.txt; it has: classInd\.txt, testlist01\.txt'):
    video_folder.find(root, ucf(tmp_path / 'ucf'), fold=4)
  with pytest.raises(UserError, match=r'no \.txt file in .*; expected: the split files of UCF101 .* or HMDB51'):
    video_folder.find(root, root)
  with pytest.raises(UserError, match=r'has no split files; expected: .*; it has: notes\.txt'):
    video_folder.find(root, make_tree(tmp_path / 'other', 'notes.txt'))
  folder = hmdb(tmp_path / 'hmdb')
  with pytest.raises(UserError, match=r'hmdb has no brush_hair_test_split3\.txt'):
    video_folder.find(root, folder, fold=3)
  write_lines(folder / 'wave_test_split1.txt', 'a.avi 3')
  with pytest.raises(
    UserError, match=r'line 1: expected NAME\.avi and 0 \(unused\), 1 \(train\) or 2 \(test\), got: a'
  ):
    video_folder.find(root, folder)

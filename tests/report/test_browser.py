"""report.html in Chromium; slow, and skipped without Chromium."""

import json

import pytest

from tests.report.test_html import METRICS, write

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('default::ResourceWarning'),  # of selenium's sockets
]


@pytest.fixture(params=[1400, 390])
def shown(browser, tmp_path, request):
  """Opens a page at a width in pixels; afterwards, checks that the console has no errors."""
  _, _, path = write(tmp_path, classes=30, videos=600, metrics=METRICS, unreadable=(3,))
  size = {'width': request.param, 'height': 900, 'deviceScaleFactor': 1, 'mobile': request.param < 500}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  browser.get(path.as_uri())
  yield browser
  assert browser.get_log('browser') == []


STICKS_OUT = 'const x = document.documentElement; return x.scrollWidth - x.clientWidth'


def test_page_is_complete_and_does_not_scroll_sideways(shown):
  script = shown.execute_script
  assert shown.title == 'made_up, validation-2x1'
  assert script('return [...document.images].filter(x => !x.complete || !x.naturalWidth).length') == 0
  assert script('return document.images.length') == 2 + 1 + 1 + 12
  assert script(STICKS_OUT) == 0


def test_classes_are_sorted_and_filtered(shown):
  script, rows = shown.execute_script, '[...document.querySelectorAll("#classes-table tbody tr")]'

  def column(index):
    return script(f'return {rows}.map(x => x.cells[{index}].innerText)')

  def click(index):
    script(f'document.querySelectorAll("#classes-table thead button")[{index}].click()')

  def numbers(index):
    return [float(value.split()[0].rstrip('%').strip()) for value in column(index)]

  before = column(0)
  click(2)
  assert numbers(2) == sorted(numbers(2), reverse=True)
  click(2)
  assert numbers(2) == sorted(numbers(2))
  click(1)
  assert numbers(1) == sorted(numbers(1), reverse=True)
  click(0)
  assert column(0) != before
  assert sorted(column(0)) == sorted(before)
  script('let x = document.getElementById("filter"); x.value = "CLASS 1"; x.dispatchEvent(new Event("input"))')
  assert script(f'return {rows}.filter(x => x.offsetHeight).length') == 11  # 1, and 10 to 19


def test_confusion_matrix_shows_cells_and_can_be_enlarged(shown):
  script = shown.execute_script
  script('document.getElementById("matrix").scrollIntoView({block: "center"})')
  box = script('let b = document.getElementById("matrix").getBoundingClientRect(); return [b.left, b.top, b.width]')
  cells = json.loads(script('return document.getElementById("cells").textContent'))
  row, column, count = cells['counts'][40]
  at = {'x': box[0] + (column + 0.5) * box[2] / 30, 'y': box[1] + (row + 0.5) * box[2] / 30}
  shown.execute_cdp_cmd('Input.dispatchMouseEvent', {'type': 'mouseMoved', **at})
  names, total = cells['names'], cells['totals'][row]
  expected = f'label {names[row]}, predicted {names[column]}: {count} of {total} videos'
  assert script('return document.getElementById("readout").textContent') == expected
  script('document.querySelector("[data-zoom=\'4\']").click()')
  zoomed = 'const x = document.getElementById("matrix"); return x.clientWidth / x.parentElement.clientWidth'
  assert script(zoomed) == pytest.approx(4, rel=0.01)
  assert script(STICKS_OUT) == 0

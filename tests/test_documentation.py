"""The documentation site: the Python API names what exists, and the site builds strictly and fits the window."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_python_api_names_what_exists():
  text = (ROOT / 'docs/api.md').read_text()
  entries = re.findall(r'^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?', text, re.M)
  assert len(entries) > 10
  for name, members in entries:
    found = pkgutil.resolve_name(name)
    assert found.__doc__, name
    for member in filter(None, members.split(', ')):
      assert getattr(found, member).__doc__, f'{name}.{member}'
  package = importlib.import_module('mevit_jax')
  for name in package.__all__:
    assert re.search(rf'\b{name}\b', text)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder of the site, built with warnings as errors: broken links, missing pages and unknown names."""
  pytest.importorskip('mkdocs', reason='mkdocs is not installed (extra docs)')
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', folder]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


@pytest.mark.slow
def test_every_page_is_in_the_site(site):
  for page in (ROOT / 'docs').rglob('*.md'):
    name = page.relative_to(ROOT / 'docs').with_suffix('')
    assert (site / ('index.html' if name.name == 'index' else f'{name}/index.html')).exists()
  assert 'load_checkpoint' in (site / 'api/index.html').read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings('default::ResourceWarning')  # of selenium's sockets
@pytest.mark.parametrize('width', [1400, 390])
def test_pages_fit_the_window(site, browser, width):
  size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 500}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  for page in site.rglob('index.html'):
    browser.get(page.as_uri())
    x = browser.execute_script('const x = document.documentElement; return [x.scrollWidth, x.clientWidth]')
    assert x[0] <= x[1] <= width, page
    assert not [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'], page

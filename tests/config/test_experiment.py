"""Config files build the paper's models, and every mistake in one is a one-line error."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mevit_jax.config import experiment
from mevit_jax.config.experiment import from_dict
from mevit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SIZES = ('Ti/16', 'S/16', 'B/16', 'L/16', 'H/14')
ARGUMENTS = {
  **dict.fromkeys(('common', 'k400', 'k600', 'ssv2', 'timesformer', 'video_folder'), SIZES),
  'demo': (None,),
  'probe': (None,),
  'small': (None,),
  'ablations/demo': ('0', '1', '2', '4'),
  'ablations/table1': ('1', '2', '3', '7', '14'),
  'ablations/table2': ('9+3', '10+2', '11+1', '12+1'),
  'ablations/table3': ('0', '2', '4', '8', '12'),
}
CONFIGS = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]


@pytest.fixture(autouse=True)
def _configs_on_the_path(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


def load(name, argument=None):
  get_config = importlib.import_module(f'configs.{name.replace("/", ".")}').get_config
  return from_dict(get_config() if argument is None else get_config(argument))


def stages(model):
  return model.space_blocks, model.motion_blocks, model.class_blocks


def test_all_config_files_are_tested():
  files = (ROOT / 'configs').rglob('*.py')
  assert {file.relative_to(ROOT / 'configs').with_suffix('').as_posix() for file in files} == set(ARGUMENTS)


@pytest.mark.parametrize(('name', 'argument'), CONFIGS)
def test_config_survives_json(name, argument):
  config = load(name, argument)
  again = from_dict(json.loads(json.dumps(experiment.to_dict(config))))
  assert again == config
  assert experiment.differences(experiment.to_dict(config), json.loads(json.dumps(experiment.to_dict(again)))) == []


@pytest.mark.parametrize('name', ['common', 'k400', 'k600', 'ssv2', 'video_folder', 'timesformer'])
def test_variants_have_the_published_sizes(name):
  table = {  # width, heads, width of the MLP, blocks: Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1
    'Ti/16': (192, 3, 768, 12),
    'S/16': (384, 6, 1536, 12),
    'B/16': (768, 12, 3072, 12),
    'L/16': (1024, 16, 4096, 24),
    'H/14': (1280, 16, 5120, 32),
  }
  for size, sizes in table.items():
    model = load(name, size).model
    assert (model.width, model.heads, model.mlp_dim, model.depth) == sizes
    assert model.patch_size == (int(size.split('/')[1]),) * 2
    assert model.image_size == (224, 224)
  assert load(name) == load(name, 'B/16')


@pytest.mark.parametrize(
  ('name', 'frames', 'sampling', 'stride'), [('k400', 8, 'dense', 32), ('k600', 16, 'dense', 16)]
)
def test_k400_config_is_the_model_of_the_paper(name, frames, sampling, stride):
  config = load(name)
  assert (stages(config.model), config.model.block_size, config.model.frames) == ((4, 7, 1), 2, frames)
  assert (config.data.sampling, config.data.stride, config.clip.short_side) == (sampling, stride, (256, 320))
  assert (config.evaluation.clips, config.evaluation.crops, config.augment.flip) == (1, 3, True)


def test_ssv2_config_is_the_model_of_the_paper():
  config = load('ssv2')
  assert (stages(config.model), config.model.block_size, config.model.frames) == ((4, 7, 1), 2, 16)
  assert (config.data.sampling, config.augment.flip) == ('uniform', False)


@pytest.mark.parametrize('name', ['k400', 'k600', 'ssv2', 'timesformer'])
def test_training_settings_are_those_of_timesformer(name):
  config = load(name)
  optimizer, training = config.optimizer, config.training
  assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ('sgd', 0.9, 1e-4)
  assert (optimizer.learning_rate, optimizer.base_batch_size) == (0.005, 64)
  assert (optimizer.schedule, optimizer.decay_epochs, optimizer.decay_factor) == ('steps', (11.0, 14.0), 0.1)
  assert (training.epochs, training.batch_size, training.label_smoothing) == (15.0, 64, 0.0)
  assert config.model.drop_path == 0.1


def test_timesformer_config_is_timesformer():
  model = load('timesformer').model
  assert (stages(model), model.block_size, model.attention_order) == ((0, 12, 0), 1, 'time_space')
  assert not model.class_token_in_motion


ROWS = {
  **{('table1', m): ((0, 12, 0), int(m)) for m in ARGUMENTS['ablations/table1']},
  ('table2', '9+3'): ((0, 9, 3), 2),
  ('table2', '10+2'): ((0, 10, 2), 2),
  ('table2', '11+1'): ((0, 11, 1), 2),
  ('table2', '12+1'): ((0, 12, 1), 2),
  **{('table3', motion): ((12 - int(motion), int(motion), 0), 2) for motion in ARGUMENTS['ablations/table3']},
  ('demo', '0'): ((3, 0, 1), 2),
  ('demo', '1'): ((1, 2, 1), 1),
  ('demo', '2'): ((1, 2, 1), 2),
  ('demo', '4'): ((1, 2, 1), 4),
}


@pytest.mark.parametrize(('table', 'argument'), ROWS)
def test_ablation_configs_change_only_the_stages(table, argument):
  row, base = load(f'ablations/{table}', argument), load('demo' if table == 'demo' else 'k400')
  assert (stages(row.model), row.model.block_size) == ROWS[table, argument]
  stage = ('space_blocks', 'motion_blocks', 'class_blocks', 'block_size')
  same = {name: getattr(base.model, name) for name in stage}
  assert dataclasses.replace(row, model=dataclasses.replace(row.model, **same)) == base


def test_demo_ablation_block_size_is_the_grid():
  assert load('demo').model.grid == (4, 4)


# Mistakes.


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'modle': {}}, 'no field modle; the nearest is model'),
    ({'model': {'blocksize': 2}}, 'no field model.blocksize; the nearest is model.block_size'),
    ({'data': {'shortside': (1, 2)}}, 'no field data.shortside; the nearest is data.short_side'),
    ({'mesh': {'zzz': 1}}, 'no field mesh.zzz; the fields are data'),
    ({'model': {'frames': 2.5}}, 'model.frames must be of type int, not 2.5'),
    ({'model': {'frames': True}}, 'model.frames must be of type int, not True'),
    ({'model': {'frames': '8'}}, "model.frames must be of type int, not '8'"),
    ({'model': {'patch_size': (16, 'x')}}, "model.patch_size must be of type int, not 'x'"),
    ({'augment': {'flip': 1}}, 'augment.flip must be of type bool, not 1'),
    ({'training': {'epochs': 'many'}}, "training.epochs must be of type float, not 'many'"),
    ({'training': {'epochs': float('nan')}}, 'training.epochs must be a finite number, not nan'),
    ({'training': {'epochs': float('inf')}}, 'training.epochs must be a finite number, not inf'),
    ({'training': {'epochs': 0}}, 'training.epochs must be in .0, 1e.06., not 0'),
    ({'training': {'batch_size': 0}}, 'training.batch_size must be in .1, 1e.07., not 0'),
    ({'training': {'accumulate': 3}}, 'training.batch_size 64 is not divisible by training.accumulate 3'),
    ({'training': {'seed': -1}}, 'training.seed must be in .0, .*, not -1'),
    ({'training': {'evaluate_every': -5}}, 'training.evaluate_every must be in .0, .*, not -5'),
    ({'training': {'label_smoothing': 1.0}}, 'training.label_smoothing must be in'),
    ({'training': {'patience': 3}}, 'training.patience 3 needs training.evaluate_every'),
    ({'training': {'profile': (3,)}}, 'training.profile must be'),
    ({'training': {'profile': (0, 3)}}, 'training.profile must be'),
    ({'training': {'profile': (5, 3)}}, 'training.profile must be'),
    ({'data': {'short_side': (64, 72, 80)}}, 'data.short_side must be'),
    ({'data': {'short_side': (100, 320)}}, 'short_side .* must be an increasing range that starts at the short side'),
    ({'data': {'std': (0.5, 0.0, 0.5)}}, 'data.std'),
    ({'data': {'mean': (0.5,), 'std': (0.5,)}}, 'data.mean must be three numbers'),
    ({'data': {'sampling': 'sparse'}}, "sampling must be one of .*, not 'sparse'"),
    ({'data': {'class_balance': 1.5}}, r'data.class_balance must be in \[0, 1\], not 1.5'),
    ({'data': {'workers': -1}}, 'data.workers must be in .0, 1024., not -1'),
    ({'optimizer': {'name': 'lion'}}, r"optimizer.name must be one of .*not 'lion'"),
    ({'optimizer': {'schedule': 'linear'}}, 'optimizer.schedule must be one of'),
    ({'optimizer': {'base_batch_size': 0}}, 'optimizer.base_batch_size must be in .1, .*, not 0'),
    ({'optimizer': {'learning_rate': -0.1}}, 'optimizer.learning_rate must be at least 0, not -0.1'),
    ({'optimizer': {'no_decay': '('}}, 'optimizer.no_decay is not a regular expression'),
    ({'evaluation': {'crops': 0}}, 'evaluation.crops must be in .1, 100., not 0'),
    ({'model': {'block_size': 15}}, 'block_size 15 is larger than the 14x14 grid'),
    ({'model': {'image_size': 100}}, 'image_size .100, 100. is not divisible by model.patch_size'),
    ({'model': {'width': 10**12}}, 'model.width must be in .1, .*, not 1000000000000'),
    ({'model': {'motion_blocks': 100_000}}, 'model.motion_blocks must be in'),
    ({'model': {'layer_norm_eps': -1.0}}, 'model.layer_norm_eps must be in'),
    ({'training': {'seed': 2**64}}, 'training.seed must be in'),
    ({'data': {'workers': 10**6}}, 'data.workers must be in'),
    ({'evaluation': {'views': '1000000000x1'}}, 'evaluation.clips must be in'),
    ({'optimizer': {'decay_epochs': (-1.0,)}}, 'optimizer.decay_epochs must be in'),
    ({'model': {'attention_order': 'both'}}, 'model.attention_order must be one of'),
  ],
  ids=str,
)
def test_mistakes_are_one_line_errors_with_the_field(values, message):
  with pytest.raises(UserError, match=message) as raised:
    from_dict(values)
  assert '\n' not in str(raised.value)


def test_integers_become_floats_and_numbers_become_tuples():
  config = from_dict({'training': {'epochs': 3}, 'model': {'image_size': 64}, 'data': {'short_side': [64]}})
  assert (config.training.epochs, type(config.training.epochs)) == (3.0, float)
  assert (config.model.image_size, config.clip.short_side) == ((64, 64), (64, 64))


def test_differences_between_configs():
  one, other = (
    experiment.to_dict(from_dict({'model': {'block_size': m}, 'training': {'seed': s}})) for m, s in ((2, 0), (7, 1))
  )
  assert experiment.differences(one, other) == ['model.block_size: 2 -> 7', 'training.seed: 0 -> 1']
  assert experiment.differences(one, {**one, 'new': 1}) == ['new: None -> 1']
  assert experiment.differences({'a': (1, 2)}, {'a': [1, 2]}) == []


# The command line: one process per case, all started at once.

OWN = """
from configs import demo

def get_config():
  config = demo.get_config()
  config.model.blok_size = 3
  return config
"""
COMMANDS = {
  'a flag': (['--config=configs/demo.py', '--config.model.blok_size=3'], 'blok_size; the nearest is block_size'),
  'a flag like no other': (['--config=configs/demo.py', '--config.model.zebra=3'], 'the config has no field zebra\n'),
  'no config': ([], '--config=... is missing'),
  "a user's own file": (['--config={own}'], 'blok_size; the nearest is block_size'),
  'a field like no other in it': (['--config={odd}'], 'the config has no field zebra\n'),
  'no such file': (['--config=configs/kinetics.py'], "No such file or directory: 'configs/kinetics.py'"),
  'a folder': (['--config=configs'], 'error: Is a directory: '),
  'a file of something else': (['--config={none}'], 'the config file has no function get_config()'),
  'not a config': (['--config={three}'], 'must return the config that default_config() returned, not 3'),
  'an empty name': (['--config=configs/demo.py', '--workdir='], 'flag --workdir=: must not be empty'),
  'an argument too many': (['--config=configs/demo.py:x'], 'the config takes no argument: give --config without'),
  'no number': (['--config=configs/ablations/table1.py:x'], "config file: 'x' is not an integer"),
  'no integer': (['--config=configs/demo.py', '--config.model.frames=2.5'], "frames=2.5: '2.5' is not an integer"),
  'no such size': (['--config=configs/k400.py:Q/16'], "no variant 'Q/16'"),
  'tuples': (['--config=configs/demo.py', '--config.model.image_size=(24, 32)', '--config.data.short_side=40,48',
              '--config.data.data_dir={tmp}'], "{tmp} has no dataset 'moving_shapes'"),
}  # fmt: skip


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
  tmp = tmp_path_factory.mktemp('commands')
  (tmp / 'own.py').write_text(OWN)
  (tmp / 'odd.py').write_text(OWN.replace('blok_size', 'zebra'))
  (tmp / 'none.py').write_text('')
  (tmp / 'three.py').write_text('def get_config():\n  return 3\n')
  names = {'tmp': tmp, **{name: tmp / f'{name}.py' for name in ('own', 'odd', 'none', 'three')}}

  def start(arguments):
    command = [sys.executable, 'main.py', f'--workdir={tmp}/run', *(one.format(**names) for one in arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  processes = {name: start(arguments) for name, (arguments, _) in COMMANDS.items()}
  ends = {name: (*process.communicate(timeout=400), process.returncode) for name, process in processes.items()}
  assert not (tmp / 'run').exists()
  return names, ends


@pytest.mark.parametrize('name', COMMANDS)
def test_mistakes_on_the_command_line_are_one_line_errors(name, commands):
  names, ends = commands
  output, error, code = ends[name]
  assert code == 1
  assert (output, error.count('\n')) == ('', 1), error
  assert error.startswith('error: ')
  assert COMMANDS[name][1].format(**names) in error

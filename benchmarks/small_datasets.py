"""Writes small datasets of generated videos that differ in kind, for tuning and testing configs/small.py.

  python -m benchmarks.small_datasets VIDEOS

Writes VIDEOS/KIND/SPLIT/CLASS/NUMBER.mp4 for each kind; docs/small_datasets.md has the commands that prepare them and
train on them, and the results. All kinds have 64x64 pixels and 32 frames at 30 per second:

  appearance   6 textures (300 training videos); the motion says nothing
  motion       8 motions of a shape, in pairs that are each other's reverse (1,000)
  both         3 shapes x 4 directions (600)
"""

import colorsys
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mevit_jax.datasets.builders import moving_shapes

FRAMES, SIZE = 32, 64
TRAIN = {'appearance': 300, 'motion': 1000, 'both': 600}
HELD_OUT = {'validation': 120, 'test': 400}
TEXTURES = ('stripes', 'checks', 'dots', 'rings', 'waves', 'clouds')
SHAPES = ('square', 'triangle', 'dart')
DIRECTIONS = ('moves_right', 'moves_left', 'moves_down', 'moves_up')


def main(folder: Path) -> None:
  """Writes the videos of all kinds."""
  for kind, (names, render) in KINDS.items():
    for split, count in {'train': TRAIN[kind], **HELD_OUT}.items():
      for i in range(count):
        name = names[i % len(names)]
        rng = np.random.default_rng([i, *f'{kind}/{split}'.encode()])
        path = folder / kind / split / name / f'{i:05d}.mp4'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_shapes.encode(render(name, rng)))
    print(f'{folder / kind}: {TRAIN[kind]} training videos of {len(names)} classes', flush=True)


def render_texture(name: str, rng: np.random.Generator) -> np.ndarray:
  """Renders a texture that drifts in a random direction, under a moving shade, uint8 `t h w 3`."""
  time = np.linspace(0, 1, FRAMES)[:, None, None]
  y, x = np.mgrid[:SIZE, :SIZE] / SIZE  # h w
  shift, angle, scale = rng.uniform(-0.4, 0.4, 2), rng.uniform(0, 2 * np.pi), rng.uniform(5, 9)
  u = np.cos(angle) * x - np.sin(angle) * y + shift[0] * time  # t h w
  v = np.sin(angle) * x + np.cos(angle) * y + shift[1] * time
  a, b = (2 * np.pi * scale * w + rng.uniform(0, 2 * np.pi) for w in (u, v))
  level = {
    'stripes': lambda: np.sin(a) > 0,
    'checks': lambda: np.sin(a) * np.sin(b) > 0,
    'dots': lambda: np.sin(a) + np.sin(b) > 1.1,
    'rings': lambda: np.sin(2 * np.pi * scale * np.hypot(u - 0.3, v - 0.3)) > 0,
    'waves': lambda: np.sin(a + 2 * np.sin(0.7 * b)) > 0,
    'clouds': lambda: np.sin(0.6 * a + 2 * np.sin(0.4 * b)) + np.sin(0.5 * b + 2 * np.sin(0.3 * a)),
  }[name]()
  level = np.clip(level, 0, 1)[..., None]  # t h w 1
  dark, light = (np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.8), value)) for value in (0.3, 0.85))
  video = dark + (light - dark) * level + rng.normal(0, 0.04, (FRAMES, SIZE, SIZE, 1))
  return (255 * np.clip(video, 0, 1)).astype(np.uint8)


def render_motion(name: str, rng: np.random.Generator) -> np.ndarray:
  """Renders a motion of moving_shapes, uint8 `t h w 3`."""
  pair = next(pair for pair, names in moving_shapes.PAIRS.items() if name in names)
  return moving_shapes.render(name, moving_shapes.draw(pair, rng), FRAMES, SIZE)


def render_both(name: str, rng: np.random.Generator) -> np.ndarray:
  """Renders a shape that moves in a direction, uint8 `t h w 3`."""
  shape, _, direction = name.partition('_')
  pair = next(pair for pair, names in moving_shapes.PAIRS.items() if direction in names)
  params = dataclasses.replace(moving_shapes.draw(pair, rng), shape=shape)
  return moving_shapes.render(direction, params, FRAMES, SIZE)


KINDS: dict[str, tuple[tuple[str, ...], Callable[[str, np.random.Generator], np.ndarray]]] = {
  'appearance': (TEXTURES, render_texture),
  'motion': (moving_shapes.CLASS_NAMES, render_motion),
  'both': (tuple(f'{shape}_{direction}' for shape in SHAPES for direction in DIRECTIONS), render_both),
}

if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python -m benchmarks.small_datasets VIDEOS')
  main(Path(sys.argv[1]))

"""Draws docs/augmentation.png and docs/mixing.png with the functions that training calls.

python -m docs.pictures
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mevit_jax.augment.clip import augment
from mevit_jax.augment.mixing import mix
from mevit_jax.augment.randaugment import OPERATIONS, operate
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization

FRAMES, SIZE, TEXT = 8, 72, 200
FOLDER = Path(__file__).parent
NORMALIZATION = Normalization()
SMOOTHING = 0.1


def draw_clip(sky: tuple, ground: tuple, shape: str) -> np.ndarray:
  """Draws a clip of hills under a sky, and a ball that rolls or a box that falls: `t h w 3` uint8."""
  large = 4 * SIZE  # drawn large and made smaller, for smooth edges
  frames = []
  for i in range(FRAMES):
    part = i / (FRAMES - 1)
    shade = np.linspace(0.55, 1.0, large)[:, None, None] * np.asarray(sky) * np.ones((1, large, 1))
    frame = Image.fromarray(shade.astype(np.uint8))
    pen = ImageDraw.Draw(frame)
    x = np.arange(-8, large + 9, 8)
    hills = 0.62 * large + 14 * np.sin(x / 37 + 1) + 9 * np.sin(x / 13)
    pen.polygon([(-8, large), *zip(x.tolist(), hills.tolist(), strict=True), (large + 8, large)], fill=ground)
    for x in range(10, large, 40):
      pen.line([(x, 0.72 * large), (x + 10, large)], fill=tuple(c * 2 // 3 for c in ground), width=5)
    if shape == 'ball':
      x, y, r = large * (0.14 + 0.7 * part), 0.6 * large, 42
      pen.ellipse([x - r, y - r, x + r, y + r], fill=(214, 48, 40), outline=(90, 10, 10), width=5)
      spoke = r * np.asarray([np.cos(5 * part), np.sin(5 * part)])
      pen.line([x - spoke[0], y - spoke[1], x + spoke[0], y + spoke[1]], fill=(250, 235, 200), width=9)
    else:
      x, y, r = 0.6 * large, large * (0.14 + 0.56 * part), 38
      pen.rectangle([x - r, y - r, x + r, y + r], fill=(240, 200, 40), outline=(80, 60, 0), width=6)
      pen.line([x - r, y, x + r, y], fill=(80, 60, 0), width=6)
    frames.append(np.asarray(frame.resize((SIZE, SIZE), Image.Resampling.BOX)))
  return np.stack(frames)


BALL = draw_clip((150, 190, 240), (70, 130, 60), 'ball')
BOX = draw_clip((245, 190, 150), (120, 95, 80), 'box')


def in_training(seed: int, **fields) -> jax.Array:
  """Augments the clip of the ball like a training step: `t h w 3`."""
  keys = jax.random.key(seed)[None]
  clips, labels = jnp.asarray(BALL[None]), jnp.zeros(1, jnp.int32)
  return augment(clips, labels, keys, AugmentConfig(**fields), (0,), NORMALIZATION)[0][0]


def rows_of_augmentation() -> list[tuple[str, jax.Array]]:
  """Returns each augmentation with its field."""
  rows = [('input', BALL), ('flip', in_training(3, flip=True))]
  for i, name in enumerate(OPERATIONS):
    if name != 'identity':
      rows.append((f'randaugment\n{name}, level 9', operate(BALL, i, 9.0, 1)))
  drawn = {'randaugment': 4, 'randaugment_magnitude': 7.0}
  rows += [(f'randaugment=4\nmagnitude 7, draw {seed + 1}', in_training(seed, **drawn)) for seed in range(2)]
  rows += [(f'color_jitter\ndraw {seed + 1}', in_training(seed, color_jitter=1.0)) for seed in range(2)]
  rows += [('grayscale', in_training(0, grayscale=1.0)), ('blur', in_training(1, blur=1.0))]
  rows += [
    ("erase\nerase_fill='noise'", in_training(1, erase=1.0)),
    ("erase\nerase_fill='mean'", in_training(7, erase=1.0, erase_fill='mean')),
  ]
  return rows


def rows_of_mixing() -> list[tuple[str, jax.Array]]:
  """Returns pairs of clips with their soft labels."""
  video = jnp.stack([BALL, BOX])
  targets = (1 - SMOOTHING) * jnp.eye(2) + SMOOTHING / 2
  rows = [(f'{name}\n{_soft(target)}', clip) for name, clip, target in zip('ab', (BALL, BOX), targets, strict=True)]
  for name, fields in (('mixup=0.8', (0.8, 0.0)), ('cutmix=1.0', (0.0, 1.0))):
    mixed, labels = mix(video, targets, jax.random.split(jax.random.key(2)), *fields, 1.0, 0.5)
    rows += [
      (f'{name}, clip {i}\n{_soft(label)}', clip) for i, (clip, label) in enumerate(zip(mixed, labels, strict=True))
    ]
  return rows


def _soft(target: jax.Array) -> str:
  return 'rolls {:.3f}, falls {:.3f}'.format(*np.asarray(target))


def film_strips(path: Path, rows: list[tuple[str, jax.Array]]) -> None:
  """Writes a PNG with one row of frames per clip, and its text on the left."""
  gap = 3
  picture = Image.new('RGB', (TEXT + FRAMES * (SIZE + gap), len(rows) * (SIZE + gap) + gap), 'white')
  pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
  for row, (text, clip) in enumerate(rows):
    top = gap + row * (SIZE + gap)
    pen.multiline_text((8, top + SIZE / 2), text, 'black', font, anchor='lm', spacing=5)
    for column, frame in enumerate(np.clip(np.asarray(clip), 0, 255).astype(np.uint8)):
      picture.paste(Image.fromarray(frame), (TEXT + column * (SIZE + gap), top))
  picture.save(path, optimize=True)
  print(f'{path.name}: {len(rows)} rows, {path.stat().st_size / 1000:.0f} kB')


if __name__ == '__main__':
  film_strips(FOLDER / 'augmentation.png', rows_of_augmentation())
  film_strips(FOLDER / 'mixing.png', rows_of_mixing())

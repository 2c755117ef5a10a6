"""``mixcon analyze effective-dimension``: over how many directions a model's features spread, layer by layer.

Of the features `[N, D]` of N tokens, after PanGu-pi (Wang et al., 2023, arXiv 2312.17276): the least d for which the d
largest eigenvalues of their covariance, the squared singular values of the centred features over N, hold a share of
0.8 of the sum of all. Features that become alike with depth lie in ever fewer directions.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mixcon_jax.analyses import features
from mixcon_jax.data import files
from mixcon_jax.errors import UserError
from mixcon_jax.evaluate import rows_to_score
from mixcon_jax.inference.load import load_model

SHARE = 0.8  # the paper's
BAR = 40  # characters for all D dimensions


class Moments:
    """The mean and the scatter of rows, a batch at a time: memory does not grow with their number.

    Each batch is centred by itself before it is added (Chan, Golub and LeVeque, 1983): of features far from 0, sums of
    squares would lose the digits that tell them apart.

    Attributes:
      count: rows so far.
      mean: float64 `[D]`.
      scatter: float64 `[D, D]`, the sum over rows of (x − mean)(x − mean)ᵀ.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))

    def add(self, rows: Float[np.ndarray, 'n d']) -> None:
        """Takes in further rows, of any floating-point type."""
        if not len(rows):
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(axis=0)
        centred, apart, total = rows - mean, mean - self.mean, self.count + len(rows)
        self.scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean += apart * (len(rows) / total)
        self.count = total

    def variances(self) -> Float[np.ndarray, 'd']:
        """Those along the principal axes, the largest first: the eigenvalues of the covariance."""
        return np.maximum(np.linalg.eigvalsh(self.scatter)[::-1], 0.0) / max(self.count, 1)


def effective_dimension(variances: Float[np.ndarray, 'd'], share: float = SHARE) -> int:
    """The least d for which the first d hold ``share`` of the sum; 0 where all are 0.

    Args:
      variances: none negative, the largest first.
      share: above 0, at most 1.
    """
    held = np.cumsum(variances)
    return int(np.searchsorted(held, share * held[-1])) + 1 if held[-1] > 0 else 0


@dataclasses.dataclass(frozen=True)
class Found:
    """Effective dimensions of a checkpoint.

    Attributes:
      step: the checkpoint's.
      share: of the variance, that is held.
      tokens: N.
      width: D.
      dimensions: of the embedding's features and of those after each layer, in the order of ``features.names``.
      names: of the same.
    """

    step: int
    share: float
    tokens: int
    width: int
    dimensions: tuple[int, ...]
    names: tuple[str, ...]

    def to_json(self) -> str:
        """Everything, the layers numbered from 0."""
        first, *rest = self.dimensions
        layers = [
            {'layer': i, 'kind': kind, 'effective_dimension': dimension}
            for i, (kind, dimension) in enumerate(zip(self.names[1:], rest, strict=True))
        ]
        values: dict[str, Any] = {'step': self.step, 'share': self.share, 'tokens': self.tokens, 'width': self.width}
        return json.dumps(values | {'embedding': first, 'layers': layers}, indent=1)

    def to_text(self) -> str:
        """A table, a line for each layer."""
        kind, digits = max(map(len, self.names)), len(str(self.width))
        lines = [
            f'step {self.step}: axes that hold {self.share:g} of the variance of {self.tokens:,} tokens',
            f'{"layer":5}  {"kind":{kind}}  effective dimension',
        ]
        for i, (name, dimension) in enumerate(zip(self.names, self.dimensions, strict=True)):
            bar = '█' * round(BAR * dimension / self.width)
            number = str(i - 1) if i else ''
            lines.append(f'{number:>5}  {name:{kind}}  {dimension:{digits}} of {self.width}  {bar}'.rstrip())
        return '\n'.join(lines)


def analyze(
    workdir: str | Path,
    paths: Sequence[str] = (),
    step: int | str | None = None,
    batch_size: int = 0,
    share: float = SHARE,
    skip: int = 1,
    mesh: Sequence[str] = (),
) -> Found:
    """The effective dimension of a checkpoint's features, of the embedding and after each layer.

    Args:
      workdir: a run directory.
      paths: files or globs to read; none means the run's held-out split, or its task's held-out rows.
      step: a checkpoint's step, ``'best'`` or None for the newest.
      batch_size: rows of a batch; 0 means the run's own. The result does not depend on it, up to rounding.
      share: of the variance, above 0 and at most 1.
      skip: tokens to leave out at the start of each document's part of a row: they have seen next to nothing.
      mesh: overrides of ``load_model``.

    Raises:
      UserError: no such checkpoint or file, options that do not fit, too few tokens, or features that are not finite.
    """
    if not 0 < share <= 1:
        raise UserError(f'--share {share:g} must be above 0 and at most 1')
    if skip < 0:
        raise UserError(f'--skip {skip} must be at least 0')
    paths = files.given(paths)  # first, for loading a model takes a while
    trained = load_model(workdir, step, mesh)
    model = trained.config.model
    names = features.names(model)
    moments = [Moments(model.dim) for _ in names]
    read = features.reader(trained.model, trained.place)
    for batch in rows_to_score(trained, trained.config, workdir, paths, batch_size):
        counted = (batch['segment_ids'] > 0) & (batch['positions'] >= skip)
        for name, each, found in zip(names, moments, read(batch), strict=True):
            rows = np.asarray(found)[counted].astype(np.float64)
            if not np.isfinite(rows).all():
                raise UserError(f'the features of {name} in checkpoint {trained.step} of {workdir} are not all finite')
            each.add(rows)
    tokens = moments[0].count
    if tokens < 2:
        raise UserError(f'{tokens} tokens are too few for a covariance; give more text or a smaller --skip than {skip}')
    dimensions = tuple(effective_dimension(each.variances(), share) for each in moments)
    return Found(trained.step, share, tokens, model.dim, dimensions, tuple(names))

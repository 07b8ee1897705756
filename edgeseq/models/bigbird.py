"""BigBird's attention made causal and streaming (Zaheer et al. 2020, section 2): global, window and random blocks.

Letters as in `transformer.py`; b tokens of a block, g global blocks, w blocks of the window, r random blocks.

The published model reads both ways: each block of queries sees the global blocks, w blocks around it, and r blocks
drawn anew for it from all others. A cache that does not grow can show only what it kept. So here
- the global blocks are the first g b tokens, which all later ones see;
- the window is the last w b tokens, the current one counted;
- the random blocks are a reservoir (Vitter 1985, algorithm R). Block j behind the global ones that leaves the window
  takes the place `draw(j)` of the r, or is forgotten. At every length each block that has left is among the r with
  equal probability, as in the published model; but queries near each other see the same ones, and a block that was
  forgotten never returns. Blocks pass token by token: one that leaves lies partly in the window, partly in the
  reservoir.
`draw` is a formula in whole numbers of j, the layer and the seed (`edgeseq/ops/sparse_attention.py`), the same in every
form and on every machine. Norms, rotary positions and feed-forward are those of the LLaMA layer.

State of a layer: key and value [1,Hk,(g+w+r)b,e]; no context is too long.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeseq.models import transformer
from edgeseq.models.base import Family
from edgeseq.models.longformer import SparseConfig, SparseTransformer
from edgeseq.models.sparse_op import Pattern


@dataclass(frozen=True)
class BigBirdConfig(SparseConfig):
    """Blocks of `block` tokens: `n_global` first ones, `n_window` last ones, `n_random` drawn from the rest.

    seed: of the draws; layer i draws by seed + i.
    """

    block: int = 64
    n_global: int = 1
    n_window: int = 3
    n_random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in range(self.n_layers):
            self.pattern(layer)

    def pattern(self, layer: int) -> Pattern:
        return Pattern(
            self.n_global * self.block, self.n_window * self.block, self.block, self.n_random, self.seed + layer
        )


class BigBird(SparseTransformer):
    """Forms and state as in `SparseTransformer`."""


FAMILY = Family(
    name="bigbird",
    config=BigBirdConfig,
    model=BigBird,
    checkpoint=None,
    zoo={"bigbird-base": BigBirdConfig(50358, 768, 12, 12, 12, 64, 2048)},
    tiny=BigBirdConfig(256, 128, 4, 4, 4, 32, 264, block=8),
    state_formula="8 L Hk e (g + w + r) b",
    growth="window",
    ops=("rotary", "sparse_attention"),
    random_tensor=transformer.random_tensor,
    constants=transformer.constants,
)

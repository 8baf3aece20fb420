"""The AttentionPack paper's form: a decomposition per request, of visual tokens, over all heads.

F. Ilhan et al., "Attention-aware Inference Optimizations for Large Vision-Language Models with
Memory-efficient Decoding" (arXiv 2603.23914). The keys of a request's visual tokens, heads side by
side, `[Tv, Hk D]`, are stored as `(U S) Vᵀ` of rank `r`, the values likewise, all in 16 bits; the
basis `Vᵀ` belongs to the request and is counted. Text tokens stay dense. Values of tokens that have
gathered little attention so far are decompressed from the first half of their rank only, which
saves arithmetic, not bytes.

What differs here: importance is a token's softmax weight, summed over queries up to the present one
and averaged over heads, and the better half of the tokens counts as important. A request with so
few visual tokens that factors take more room than the tokens keeps them dense.
"""

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import DENSE_BYTES
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, Tokens


class RequestSvd:
    """One pair of ranks.

    Args:
        shape: of the cache.
        key_rank: of the keys of all heads together.
        value_rank: of the values.
        full_share: share of the tokens whose values are decompressed in full.
    """

    def __init__(
        self, shape: CacheShape, key_rank: int, value_rank: int, full_share: float = 0.5
    ) -> None:
        self.shape = shape
        self.exact = ExactTokens()
        self.full_share = full_share
        self._ranks = key_rank, value_rank

    def request_bytes(self, length: int, visual: int) -> float:
        layers = len(self.shape.layer_names)
        stored = sum(self._elements(visual, rank) for rank in self._ranks) * DENSE_BYTES * layers
        return (length - visual) * self.shape.dense_bytes + stored

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        return (
            self._read(key, tokens, self._ranks[0], 1),
            self._read(value, tokens, self._ranks[1], 1),
        )

    def coarse_value(self, layer: int, value: Tensor, tokens: Tokens) -> Tensor:
        return self._read(value, tokens, self._ranks[1], 2)

    def _elements(self, visual: int, rank: int) -> int:
        dims = self.shape.num_kv_heads * self.shape.head_size
        return min(visual * dims, (visual + dims) * rank)

    def _read(self, x: Tensor, tokens: Tokens, rank: int, divisor: int) -> Tensor:
        read, start = x.clone(), 0
        for length in tokens.lengths:
            rows = start + tokens.visual[start : start + length].nonzero()[:, 0]
            start += length
            flat = x[rows].flatten(1)
            if len(rows) and self._elements(len(rows), rank) < flat.numel():
                u, s, v = torch.linalg.svd(flat, full_matrices=False)
                latent, basis = (u * s).bfloat16().float(), v.bfloat16().float()
                kept = max(1, rank // divisor)
                read[rows] = (latent[:, :kept] @ basis[:kept]).view_as(x[rows])
        return read

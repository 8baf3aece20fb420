"""Random but well-formed codecs and batches."""

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis, LayerCodec, bases_by_kind
from vllm_attentionpack.codec.layout import KINDS, GroupLayout, Kind, LayerLayout, PlaneCounts
from vllm_attentionpack.codec.transform import principal_basis
from vllm_attentionpack.ops.pages import Pages, planes_by_owner


def gaussian(tokens: int, dims: int, decay: float, generator: torch.Generator) -> Tensor:
    """float64 `[tokens, dims]` Gaussian data whose variances fall as `exp(-decay * i)`, turned."""
    scale = torch.exp(-decay * torch.arange(dims, dtype=torch.float64) / 2)
    turn, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
    return (torch.randn(tokens, dims, generator=generator, dtype=torch.float64) * scale) @ turn


def fitted_basis(
    data: Tensor, counts: PlaneCounts, heads: int, regularization: float = 1e-9
) -> Basis:
    """The basis of `data` `[M, T, GD]` under the identity metric."""
    dims = data.shape[-1] // heads
    metric = torch.eye(dims, dtype=torch.float64).expand(heads, dims, dims)
    second = data.mT @ data / data.shape[1]
    count = torch.full((data.shape[0],), data.shape[1])
    basis = principal_basis(second, data.mean(1), count, [metric], regularization)
    return basis.truncate(counts)


def joint_bases(data: Tensor, counts: PlaneCounts, heads: int) -> dict[Kind, Basis]:
    """The bases of keys and values that share latents, `data` `[M, T, 2 GD]`."""
    return bases_by_kind([fitted_basis(data, counts, 2 * heads)])


def random_codec(
    num_kv_heads: int,
    heads_per_group: int,
    head_size: int,
    modalities: int = 2,
    key: PlaneCounts | None = None,
    value: PlaneCounts | None = None,
    padding: int = 0,
    seed: int = 0,
    joint_kv: bool = False,
) -> LayerCodec:
    """A codec fitted to random data, with different K and V planes unless given or joint."""
    generator = torch.Generator().manual_seed(seed)
    dims = heads_per_group * head_size
    key = key or PlaneCounts(n8=8, n4=8, n2=16)
    value = key if joint_kv else value or PlaneCounts(n8=4, n4=16, n2=0)
    bases: list[dict[Kind, Basis]] = []

    def data(dims: int) -> Tensor:
        return torch.stack([gaussian(4 * dims, dims, 0.05, generator) for _ in range(modalities)])

    for _ in range(num_kv_heads // heads_per_group):
        if joint_kv:
            bases.append(joint_bases(data(2 * dims), key, heads_per_group))
        else:
            planes: dict[Kind, PlaneCounts] = {"key": key, "value": value}
            bases.append(
                {kind: fitted_basis(data(dims), planes[kind], heads_per_group) for kind in KINDS}
            )
    groups = tuple(GroupLayout(key, value, joint_kv) for _ in bases)
    size = sum(group.bytes_per_token for group in groups) + padding
    return LayerCodec(LayerLayout(groups, heads_per_group, head_size, size), bases)


def latent_errors(
    codec: LayerCodec,
    kinds: tuple[Kind, ...],
    tokens: dict[Kind, Tensor],
    slots: Tensor,
    visual: Tensor | None,
    cache: Tensor,
    block_size: int,
) -> dict[int, float]:
    """Energy of what the codes of the first head group are off, by width of the whole codes.

    `kinds` share them: keys, values, or both where they are joint.
    """
    kind = kinds[0]
    planes = planes_by_owner(codec.layout, block_size)[0, kind]
    plane_codec = getattr(codec.groups[0], kind)
    pages = Pages(cache, torch.arange(len(cache))[None], block_size)
    read, _ = pages.read(torch.arange(len(cache))[None], (plane_codec, planes))
    kept = slots >= 0
    which = torch.zeros(int(kept.sum()), dtype=torch.long)
    if visual is not None and codec.num_modalities == 2:
        which = visual[kept].long()
    exact = torch.zeros(len(which), plane_codec.counts.num_columns)
    for part in kinds:
        basis = getattr(codec.groups[0], part).basis
        x = tokens[part].flatten(1)[kept, : codec.layout.group_dims].float()
        exact += torch.einsum("td,tdr->tr", x - basis.mean[which], basis.encode[which])
    columns = plane_codec.counts.columns
    first = [i for i, column in enumerate(columns) if not column.low]
    dims = torch.tensor([column.dim for column in columns])
    parts = read[0, slots[kept]] * torch.exp2(plane_codec.shift)
    whole = torch.zeros(len(exact), len(first)).index_add(1, dims, parts)
    order = dims[first].argsort()
    off = (whole - exact[:, first][:, order]).square().sum(0)
    bits = torch.tensor([columns[i].code_bits for i in first])[order]
    return {int(b): off[bits == b].sum().item() for b in bits.unique()}

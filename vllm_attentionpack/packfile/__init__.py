"""The pack file: all that serving needs to know of a calibration, in one safetensors file."""

from vllm_attentionpack.packfile.io import check_target, load_pack, read_header, save_pack
from vllm_attentionpack.packfile.schema import Fingerprint, LayerPack, Pack, PackHeader, Provenance

__all__ = [
    "Fingerprint",
    "LayerPack",
    "Pack",
    "PackHeader",
    "Provenance",
    "check_target",
    "load_pack",
    "read_header",
    "save_pack",
]

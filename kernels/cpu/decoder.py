"""Attention over the paged cache and whole decoder blocks in C++: what their structs point to is taken once."""

from collections.abc import Sequence
from ctypes import Array, Structure, byref, c_float, c_int32, c_int64, c_void_p, cast
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.cpu.layers import Layers
from deltaserve.kernels.cpu.structs import CODECS
from deltaserve.kernels.decoder import Block, Heads, Norm, Step
from deltaserve.kernels.paged import Pages
from deltaserve.kernels.segments import Segments

CACHE_CODECS = {torch.float32: CODECS.index("float32"), torch.bfloat16: CODECS.index("bf16")}


class AttentionStruct(Structure):
    """``Attention`` of attention.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("cache_rows", "heads", "key_heads", "head_width")),
        ("scale", c_float),
        ("codec", c_int32),
    )


class PagesStruct(Structure):
    """``Pages`` of attention.h."""

    _fields_ = (
        ("starts", c_void_p),
        ("count", c_int64),
        ("first", c_void_p),
        ("lengths", c_void_p),
        ("tokens", c_int64),
    )


class NormStruct(Structure):
    """``Norm`` of decoder.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("table", c_void_p),
        ("entries", c_int64),
        ("epsilon", c_float),
        ("offset", c_float),
    )


class BlockStruct(Structure):
    """``Block`` of decoder.h."""

    _fields_ = (
        ("attention_norm", NormStruct),
        ("mlp_norm", NormStruct),
        *((name, c_void_p) for name in ("input", "output", "gate_and_up", "down")),
    )


class StepStruct(Structure):
    """``Step`` of decoder.h."""

    _fields_ = (
        ("attention", AttentionStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("pages", PagesStruct),
        *((name, c_void_p) for name in ("writes", "cosines", "sines", "places")),
        ("offsets", c_void_p),
        ("owners", c_void_p),
        ("segments", c_int64),
    )


def pages_struct(pages: Pages, rows: int) -> PagesStruct:
    """Raises ValueError for tables of another kind than ``Pages`` says."""
    tables = (pages.starts, pages.first, pages.lengths)
    if any(table.dtype != torch.int64 or not table.is_contiguous() for table in tables):
        raise ValueError("The tables of pages must be contiguous int64")
    if len(pages.first) != rows or len(pages.lengths) != rows:
        raise ValueError(f"Pages of {len(pages.first)} rows for {rows} queries")
    starts, first, lengths = (table.data_ptr() for table in tables)
    return PagesStruct(starts, len(pages.starts), first, lengths, pages.tokens)


def attention_struct(keys: Tensor, values: Tensor, heads: Heads) -> AttentionStruct:
    """Raises ValueError for a cache that the kernels cannot read."""
    shape = (heads.keys, heads.width)
    for cache in (keys, values):
        if cache.dtype not in CACHE_CODECS or cache.shape[1:] != shape or not cache.is_contiguous():
            raise ValueError(
                f"The cache is {cache.dtype} {tuple(cache.shape)}, not float32 or bfloat16 [tokens, *{shape}]"
            )
    return AttentionStruct(
        *(keys.data_ptr(), values.data_ptr(), min(len(keys), len(values)), heads.count, heads.keys, heads.width),
        *(heads.scale, CACHE_CODECS[keys.dtype]),
    )


class CpuDecoder:
    """The blocks in one call of the library's ``deltaserve_decode``, for the rows of one step."""

    def __init__(self, call: Any, blocks: Sequence[Block], heads: Heads) -> None:
        self._call, self._heads, self._blocks = call, heads, blocks
        self._width = blocks[0].input.width
        self._structs = (BlockStruct * len(blocks))(*map(_block_struct, blocks))
        self._layers: list[Layers] = [layers for b in blocks for layers in (b.input, b.output, b.gate_and_up, b.down)]
        self._cache: Sequence[tuple[Tensor, Tensor]] = ()
        self._pointers: tuple[Array[c_void_p], Array[c_void_p]] | None = None
        self._attention = AttentionStruct()

    def run(self, x: Tensor, step: Step) -> None:
        """``x`` float32 ``[rows, n]`` through all blocks, in place; its rows' keys and values go into the cache.

        Raises ValueError, before anything is written, for pages or slots that there are not.
        """
        rows = len(x)
        tables = (x, step.cosines, step.sines)
        if any(table.dtype != torch.float32 or not table.is_contiguous() for table in tables):
            raise ValueError("x, cosines and sines must be contiguous float32")
        if x.shape[1] != self._width or not step.cosines.shape == step.sines.shape == (rows, self._heads.width):
            raise ValueError(f"{tuple(x.shape)} with cosines {tuple(step.cosines.shape)} does not fit the blocks")
        _check_index("writes", step.writes, rows)
        if step.places is not None:
            _check_index("places", step.places, rows)
        self._take(step.cache)
        segments = step.segments if step.segments is not None and step.segments.rows else None
        struct = StepStruct(
            self._attention,
            *(cast(pointers, c_void_p) for pointers in self._pointers),  # type: ignore[union-attr]  # just taken
            pages_struct(step.pages, rows),
            *(step.writes.data_ptr(), step.cosines.data_ptr(), step.sines.data_ptr()),
            None if step.places is None else step.places.data_ptr(),
            *((None, None, 0) if segments is None else _table(segments)),
        )
        held = self._held(segments)
        self._call(self._structs, len(self._blocks), byref(struct), x.data_ptr(), rows)
        del held  # until here: another thread may empty a slot meanwhile

    def _take(self, cache: Sequence[tuple[Tensor, Tensor]]) -> None:
        if cache is self._cache:
            return
        if len(cache) != len(self._blocks):
            raise ValueError(f"A cache of {len(cache)} layers for {len(self._blocks)} blocks")
        structs = [attention_struct(keys, values, self._heads) for keys, values in cache]
        self._attention = structs[0]
        self._attention.cache_rows = min(struct.cache_rows for struct in structs)
        pointers = c_void_p * len(structs)
        self._pointers = pointers(*(s.keys for s in structs)), pointers(*(s.values for s in structs))
        self._cache = cache

    def _held(self, segments: Segments | None) -> list[Any]:
        if segments is None:
            return []
        return [table.held[slot] for layers in self._layers for table in layers.tables for slot in segments.rows]


def _check_index(name: str, index: Tensor, rows: int) -> None:
    if index.dtype != torch.int64 or not index.is_contiguous() or len(index) != rows:
        raise ValueError(f"{name} must be contiguous int64 of {rows} rows")


def _table(segments: Segments) -> tuple[int, int, int]:
    return segments.offsets.data_ptr(), segments.slots.data_ptr(), segments.slots.numel()


def _block_struct(block: Block) -> BlockStruct:
    layers = (block.input, block.output, block.gate_and_up, block.down)
    addresses = (cast(one.whole, c_void_p) for one in layers)
    return BlockStruct(_norm_struct(block.attention_norm), _norm_struct(block.mlp_norm), *addresses)


def _norm_struct(norm: Norm) -> NormStruct:
    return NormStruct(norm.weight.data_ptr(), norm.table.data_ptr(), len(norm.table), norm.epsilon, norm.offset)

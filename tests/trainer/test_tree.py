"""The token tree: a radix tree over exact ids, and attention over it that counts every pair once."""

import dataclasses
import shutil

import pytest
import torch
from espalier.trainer.batch import Row
from espalier.trainer.tree import flex
from espalier.trainer.tree.attention import Layout, attend
from espalier.trainer.tree.core import grow
from espalier.trainer.tree.kernels import Fused, Plain
from espalier.trainer.tree.packing import cut, telling, unique_tokens
from espalier.trainer.tree.tiles import MASKED, Tile, tiles, visible, windowed
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import branching_rows
from torch.nn.attention.flex_attention import flex_attention

ids = st.lists(st.integers(0, 3), min_size=2, max_size=12)


@st.composite
def row_sets(draw):
    """Rows over few token ids, so that prefixes coincide by themselves, equal rows and prefixes among them."""
    rows = []
    for i, tokens in enumerate(draw(st.lists(ids, min_size=1, max_size=12))):
        mask = [False, *draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1))]
        logprobs = tuple(-float(i + 1) if m else 0.0 for m in mask)
        rows.append(Row(tuple(tokens), tuple(mask), logprobs, 1.0, f"t{i}", "g"))
    return rows


def paths(tree):
    """The tokens on the way to each place of a tree, itself included."""
    keys = torch.arange(tree.unique)
    on_path = (keys[None] <= keys[:, None]) & (keys[:, None] < tree.ends[None])
    return [tuple(tree.tokens[on].tolist()) for on in on_path]


@given(row_sets())
def test_a_tree_is_every_distinct_prefix_once(rows):
    tree = grow(rows)
    prefixes = {row.tokens[:n] for row in rows for n in range(1, len(row.tokens))}
    found = paths(tree)
    assert sorted(found) == sorted(prefixes)
    assert tree.unique == unique_tokens(rows) == len(prefixes), "processed is unique"
    assert tree.total == sum(len(row.tokens) - 1 for row in rows)
    assert tree.positions.tolist() == [len(path) - 1 for path in found]


@given(row_sets())
def test_every_sampled_token_is_trained_once_in_its_own_context(rows):
    tree = grow(rows)
    found = paths(tree)
    expected = [(row.tokens[:i], row.tokens[i]) for row in rows for i, m in enumerate(row.mask) if m]
    predicted = [(found[p], t) for p, t in zip(tree.predictors.tolist(), tree.targets.tolist(), strict=True)]
    assert [predicted[i] for i in tree.expand.tolist()] == expected
    assert len(set(predicted)) == len(predicted) == len(set(expected)), "each distinct prediction once"
    assert len(expected) == sum(row.trained for row in rows), "as many tokens under the loss as flat"


@given(row_sets())
def test_a_forest_shares_nothing(rows):
    forest = grow(rows, share=False)
    assert forest.unique == forest.total
    assert sorted(path for path in paths(forest)) == sorted(
        row.tokens[:n] for row in rows for n in range(1, len(row.tokens))
    )


@given(row_sets(), st.sampled_from([0.0, 3.0, 20.0, 1e9]))
def test_tiles_cover_every_pair_once(rows, call):
    tree = grow(rows)
    n = tree.unique
    counted, first = torch.zeros(n, n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    for tile in tiles(tree, call):
        counted[tile.q : tile.q_stop, tile.k : tile.k_stop] += pairs(tree, tile)
        if tile.first:
            assert (tile.q, tile.q_stop) == (tile.k, tile.k_stop)
            first[tile.q : tile.q_stop] += 1
    assert torch.equal(counted, visible(tree, Tile(0, n, 0, n)).long())
    assert (first == 1).all()


def test_masks_have_a_bound():
    """However dear a call: the mask of a tree as one call would be as large as its tokens squared."""
    rows = [Row((1, 5, i, 7), (False,) * 3 + (True,), (0.0,) * 4, 1.0, f"{i}", "g") for i in range(5000)]
    found = tiles(grow(rows), 1e12)
    assert any(tile.masked for tile in found)
    assert all((tile.q_stop - tile.q) * (tile.k_stop - tile.k) <= MASKED for tile in found if tile.masked)


@given(row_sets(), st.integers(1, 8))
def test_windows_are_counted_along_paths(rows, window):
    tree = grow(rows)
    n = tree.unique
    counted = torch.zeros(n, n, dtype=torch.long)
    for tile in windowed(tiles(tree, 3.0), tree.positions, window):
        counted[tile.q : tile.q_stop, tile.k : tile.k_stop] += pairs(tree, tile, window)
    apart = tree.positions[:, None] - tree.positions[None]
    assert torch.equal(counted, (visible(tree, Tile(0, n, 0, n)) & (apart < window)).long())


def pairs(tree, tile, window=None):
    """What a kernel computes of a tile."""
    full = torch.ones(tile.q_stop - tile.q, tile.k_stop - tile.k, dtype=torch.bool)
    return (visible(tree, tile, window) if tile.masked else full.tril() if tile.causal else full).long()


@given(row_sets(), st.integers(1, 60), st.integers(1, 3))
def test_micro_batches_charge_shared_tokens_once(rows, budget, processes):
    parts = cut(rows, budget, processes)
    assert sorted(row.trajectory for part in parts for row in part) == sorted(row.trajectory for row in rows)
    for part in parts:
        assert len(part) == 1 or unique_tokens(part) <= budget
    if unique_tokens(rows) <= budget and processes == 1:
        assert len(parts) == 1


def test_micro_batches_are_cut_where_they_share_least():
    """Two tasks of four rows each, of which one micro-batch could hold five rows and a half."""

    def row(task, i):
        tokens = (1, *[task] * 20, *[10 + i] * 10)
        return Row(tokens, (False,) * 21 + (True,) * 10, (0.0,) * 31, 1.0, f"{task}/{i}", f"g{task}")

    rows = [row(task, i) for task in (5, 6) for i in range(4)]
    parts = cut(rows, 90)
    assert [sorted(r.group for r in part) for part in parts] == [["g5"] * 4, ["g6"] * 4]


def test_the_work_of_an_update_is_spread_over_processes():
    for seed in range(10):
        rows = branching_rows(40, seed)
        for processes in (2, 3, 4):
            parts = cut(rows, 10**6, processes)
            sizes = [unique_tokens(part) for part in parts]
            assert len(parts) <= processes, "one round"
            assert max(sizes) <= 1.5 * sum(sizes) / processes


@given(row_sets())
def test_the_rows_that_are_compared_part_behind_a_common_prefix(rows):
    """Where any do; equal rows and prefixes of others would show nothing."""
    few = telling(rows, 3)
    assert 1 <= len(few) <= 4
    longest = max(len(row.tokens) for row in rows)
    assert longest == max(len(row.tokens) for row in few)
    assert len({row.tokens[:-1] for row in few}) == len(few)
    assert branches(few) == min(branches(rows), branches(few)) and (branches(few) > 0) == (branches(rows) > 0)


def branches(rows):
    """Pairs of rows that share something and then part, tokens that are only predicted left out."""
    found = 0
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            x, y = a.tokens[:-1], b.tokens[:-1]
            common = next((n for n, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), min(len(x), len(y)))
            found += 0 < common < min(len(x), len(y))
    return found


def heads(seed, tree, q_heads, k_heads, dtype, size=8):
    made = torch.Generator().manual_seed(seed)
    shapes = [(1, count, tree.unique, size) for count in (q_heads, k_heads, k_heads)]
    return [torch.randn(shape, generator=made, dtype=dtype, requires_grad=True) for shape in shapes]


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 3, 9]),
    st.sampled_from([1.0, 30.0, 1e9]),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([Fused, Plain]),
)
def test_tiles_equal_a_dense_mask(seed, window, call, counts, kernel):
    """Value and gradient in float64, against torch's own attention with the mask of all pairs."""
    tree = grow(branching_rows(8, seed))
    q, k, v = heads(seed, tree, *counts, torch.float64)
    by_tiles = attend(q, k, v, Layout(tree, work=2e6 / call), window, kernel=kernel())
    dense = attend(q, k, v, Layout(tree, 1, backend="dense"), window)
    assert torch.allclose(by_tiles, dense, atol=1e-12)
    pull = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(by_tiles, (q, k, v), pull), torch.autograd.grad(dense, (q, k, v), pull), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


def test_the_plain_kernel_takes_queries_in_parts(monkeypatch):
    tree = grow(branching_rows(8, 3))
    monkeypatch.setattr("espalier.trainer.tree.kernels.SCORES_AT_ONCE", 50)
    q, k, v = heads(0, tree, 4, 2, torch.float64)
    parts = attend(q, k, v, Layout(tree, 1), kernel=Plain())
    dense = attend(q, k, v, Layout(tree, 1, backend="dense"))
    assert torch.allclose(parts, dense, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(parts.sum(), (q, k, v)), torch.autograd.grad(dense.sum(), (q, k, v)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


@given(row_sets(), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 2, 4, 128]))
def test_flex_attention_skips_no_pair_that_counts_and_asks_about_all_others(rows, window, size):
    tree = grow(rows)
    n, mask = tree.unique, flex.blocks(tree, window, size)
    seen = visible(tree, Tile(0, n, 0, n), window)
    some, every = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (some & every).any()
    for query in range(n):
        for key in range(n):
            block = query // size, key // size
            assert some[block] or every[block] or not seen[query, key]
            assert seen[query, key] or not every[block]
    every_pair = torch.arange(n)[:, None], torch.arange(n)[None]
    assert torch.equal(mask.mask_mod(None, None, *every_pair), seen)
    assert not every[-1].any() or n % size == 0, "the last block has queries that do not exist"
    if window is None:
        needed = {(query // size, key // size) for query, key in seen.nonzero().tolist()}
        assert {(q, k) for q, k in (some | every).nonzero().tolist()} == needed, "and computes no other block"


def listed(counts, indices):
    """The table of blocks that a list of them means."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for block, count in enumerate(counts[0, 0].tolist()):
        found[block, indices[0, 0, block, :count].long()] = True
    return found


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("counts", [(4, 4), (4, 2)])
def test_flex_attention_equals_a_dense_mask(window, counts):
    """On the CPU it has no backward pass."""
    tree = grow(branching_rows(20, 7, longest=60))
    assert tree.unique > flex.BLOCK
    q, k, v = (t.detach() for t in heads(0, tree, *counts, torch.float32, size=16))
    by_flex, dense = (attend(q, k, v, Layout(tree, 1, backend), window) for backend in ("flex", "dense"))
    assert torch.allclose(by_flex, dense, atol=1e-6)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="is compiled")
def test_compiled_flex_attention_reads_the_blocks():
    """Uncompiled, it asks about every pair."""
    compiled = torch.compile(flex_attention, dynamic=True)
    for count, window, longest in ((60, None, 60), (12, None, 900), (60, 9, 60), (12, 300, 900)):
        tree = grow(branching_rows(count, 7, longest=longest))
        q, k, v = (t.detach() for t in heads(0, tree, 4, 2, torch.float32, size=32))
        mask = flex.blocks(tree, window)
        assert (mask.full_kv_num_blocks.sum() > 0) == (longest == 900)
        with torch.no_grad():
            found = compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
        assert torch.allclose(found, attend(q, k, v, Layout(tree, 1, "dense"), window), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs CUDA")
@pytest.mark.parametrize("window", [None, 9])
def test_gradients_on_cuda_equal_a_dense_mask(window):
    tree = grow(branching_rows(60, 7, longest=60)).to(torch.device("cuda"))
    q, k, v = (t.detach().cuda().requires_grad_() for t in heads(0, tree, 4, 2, torch.float32, size=16))
    pull = torch.randn(1, tree.unique, 4, 16, device="cuda")
    grads = {
        backend: torch.autograd.grad(attend(q, k, v, Layout(tree, 4 * 4 * 16, backend), window), (q, k, v), pull)
        for backend in ("dense", "tiles", "flex")
    }
    for backend in ("tiles", "flex"):
        for found, want in zip(grads[backend], grads["dense"], strict=True):
            assert float((found - want).abs().max() / want.abs().max()) <= 1e-5, backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [Fused, Plain])
def test_half_precision_is_as_near_as_a_dense_mask(dtype, kernel, monkeypatch):
    """Value and gradients; the plain kernel some queries at a time, so that it has sums to keep."""
    monkeypatch.setattr("espalier.trainer.tree.kernels.SCORES_AT_ONCE", 1 << 8)
    tree = grow(branching_rows(100, 5))
    half = [t.detach().to(dtype).requires_grad_() for t in heads(0, tree, 4, 2, torch.float64)]
    exact = [t.detach().double().requires_grad_() for t in half]
    pull = torch.randn(1, tree.unique, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def found(inputs, backend):
        out = attend(*inputs, Layout(tree, 2e6, backend), kernel=kernel())
        assert out.dtype == inputs[0].dtype
        return [out.detach(), *torch.autograd.grad(out, inputs, pull.to(out.dtype))]

    for truth, ours, theirs in zip(found(exact, "dense"), found(half, "tiles"), found(half, "dense"), strict=True):
        off, usual = (float((t.double() - truth).abs().max()) for t in (ours, theirs))
        assert off <= 2 * usual


def saved_bytes(make):
    """Bytes that are kept for backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a node's own result would be a reference cycle, never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = make()
    return sum(kept.values()), result


def test_nothing_is_saved_for_a_segment():
    """A chain of branches: what is kept grows with the tokens, not with the lengths of the paths of all segments."""
    trunk = tuple(range(100, 400))
    rows = [
        Row((*trunk[: 10 * i], *[i] * 10), (False,) * (10 * i + 9) + (True,), (0.0,) * (10 * i + 10), 1.0, f"{i}", "g")
        for i in range(1, 30)
    ]
    tree = grow(rows)
    q, k, v = heads(0, tree, 4, 2, torch.float32)
    layout = Layout(tree, work=2e6)
    assert len(layout.tiles(None)) > 30
    kept, _ = saved_bytes(lambda: attend(q, k, v, layout))
    inputs = sum(t.numel() * 4 for t in (q, k, v))
    assert kept <= inputs + q.numel() * 4 + 4 * tree.unique * 4 + 64
    gathered = sum(int(tree.positions[node.stop - 1]) + 1 for node in tree.nodes()) * 2 * 2 * 8 * 4
    assert kept < gathered / 2, "control: the keys and values of every segment's path would be more"


def test_rows_keep_what_is_theirs():
    """Two rows of the same tokens: one prediction, expanded to both."""
    row = branching_rows(1)[0]
    tree = grow([row, dataclasses.replace(row, advantage=-2.0, trajectory="other")])
    assert tree.targets.numel() == row.trained
    assert tree.expand.tolist() == [*range(row.trained)] * 2

"""The Triton kernels and the decoder's arena on an NVIDIA GPU, eagerly and in a graph."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from hotgraph_server.engine.stages import Stages
from hotgraph_server.kernels.activation import ACTIVATIONS, gated_activation
from hotgraph_server.kernels.norm import add_rms_norm, rms_norm
from hotgraph_server.kernels.prepare import StepSource, prepare_step
from hotgraph_server.kernels.prepare_stage import IS_LAST, IS_SAMPLED, StageLayout
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.rope_kv import rope_and_write_kv
from tests.gpu.decoders import CONFIGS, CUDA, TOLERANCES, arena_of, copied, decoder, relative_error
from tests.server.kernels import twin_checks
from tests.server.models.driver import Driver, random_model, random_tokens, reference_logits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_tokens", [1, 3, 200])
@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("size", [*twin_checks.HIDDEN_SIZES, 4096, 16384])
def test_norm(size: int, dtype: torch.dtype, num_tokens: int) -> None:
    """Norm, and sum and norm, give what they give on the CPU."""
    twin_checks.check_rms_norm(size, dtype, CUDA, num_tokens=num_tokens, seed=size)
    twin_checks.check_add_rms_norm(size, dtype, CUDA, num_tokens=num_tokens, seed=size + 1)


@pytest.mark.parametrize("num_tokens", [1, 3, 200])
@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Every activation gives what it gives on the CPU."""
    for size in (80, 1536, 11008):
        twin_checks.check_gated_activation(activation, size, dtype, CUDA, num_tokens=num_tokens, seed=size)


@pytest.mark.parametrize("num_tokens", [1, 3, 200])
@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("heads", twin_checks.HEADS.values(), ids=twin_checks.HEADS)
def test_rope_and_write_kv(heads: tuple[int, int, int, int, bool], dtype: torch.dtype, num_tokens: int) -> None:
    """Heads of every kind are turned and cached as on the CPU."""
    twin_checks.check_rope_and_write_kv(heads, dtype, CUDA, num_tokens=num_tokens, seed=num_tokens)


def test_prepare_step() -> None:
    """Few rows and many, short block tables and long ones, from stages in the host's memory, give what they give on the CPU."""
    for seed in range(30):
        twin_checks.check_prepare_step(CUDA, seed=seed)
        twin_checks.check_prepare_step(CUDA, seed=seed, min_rows=100, max_rows=148, max_blocks=1500)
        twin_checks.check_prepare_step(CUDA, seed=seed, max_blocks=1500, lengths=(1, 300, 1100))


def test_no_numbers_are_hidden() -> None:
    """Not a number in, not a number out: a failed row must show in its logits."""
    x = torch.ones(2, 4096, dtype=torch.float16, device=CUDA)
    x[0, 5] = torch.nan
    for result in (
        rms_norm(x, x[1], 1e-5),
        add_rms_norm(torch.ones_like(x), x, x[1], 1e-5),
        *(gated_activation(x.flip(0), name).flip(0) for name in ACTIVATIONS),
    ):
        assert result[0].isnan().any()
        assert not result[1].isnan().any()


STEPS = ({"a": 50}, {"a": 39, "b": 30}, {"a": 1, "b": 1, "c": 5}, {"b": 1, "c": 1}, {"b": 1, "c": 1})


@pytest.mark.parametrize("padding", [(0, 0), (3, 2)], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_arena_gives_the_logits_of_transformers(name: str, dtype: torch.dtype, padding: tuple[int, int]) -> None:
    """With an arena and without, chunks, decode rows and mixed steps give transformers' float32 logits within rounding."""
    reference = random_model(deepcopy(CONFIGS[name]))
    lengths = {"a": 90, "b": 33, "c": 7}
    texts = {key: random_tokens(length, 1024, seed) for seed, (key, length) in enumerate(lengths.items())}
    expected = {key: reference_logits(reference, text) for key, text in texts.items()}
    model = decoder(name, dtype)
    drivers = [
        Driver(model, num_padding_tokens=padding[0], num_padding_rows=padding[1], arena=arena)
        for arena in (None, arena_of(model))
    ]
    position = dict.fromkeys(texts, 0)
    for step in STEPS:
        chunks = {key: texts[key][position[key] : position[key] + count] for key, count in step.items()}
        without, with_arena = (driver.step(chunks) for driver in drivers)
        for key, count in step.items():
            position[key] += count
            wanted = expected[key][position[key] - 1]
            assert relative_error(without[key], wanted) < TOLERANCES[dtype], f"{key} in step {step}"
            assert relative_error(with_arena[key], wanted) < TOLERANCES[dtype], f"{key} in step {step} with an arena"


@pytest.mark.parametrize("shape", ["decode", "mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_forward_replays_with_other_inputs(name: str, shape: str) -> None:
    """A graph of a forward, replayed with other tokens, lengths and blocks in its inputs, gives the eager logits to the bit."""
    model = decoder(name, torch.float16)
    arena, other_arena = arena_of(model, max_tokens=512), arena_of(model, max_tokens=512)
    tokens = random_tokens(400, 1024, seed=1)
    counts = {"a": 1, "b": 1, "c": 1} if shape == "decode" else {"a": 1, "b": 17, "c": 4}
    padding = 0 if shape == "decode" else 3
    driver = Driver(model, arena=arena, num_padding_tokens=padding, num_padding_rows=padding)
    # One prompt long enough that tables keep their width while the texts grow.
    driver.step({"a": tokens[:90], "b": tokens[90:97], "c": tokens[97:120], "long": tokens[:300]})
    buffers, _ = driver.tensors({key: tokens[:count] for key, count in counts.items()})

    with torch.inference_mode():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            model.forward(buffers, driver.kv, arena)  # cuBLAS makes its workspace for this stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model.forward(buffers, driver.kv, arena)

        for start in (150, 200, 250):
            chunks = {
                key: tokens[start + index : start + index + count] for index, (key, count) in enumerate(counts.items())
            }
            step, names = driver.tensors(chunks)
            copied(step, buffers)
            captured.fill_(torch.nan)
            graph.replay()
            found = captured.clone()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):  # on which cuBLAS has the same workspace, so chooses the same algorithms
                expected = model.forward(step, driver.kv, other_arena)
            torch.cuda.synchronize()
            assert torch.equal(found[: len(names)], expected[: len(names)])


def test_a_forward_with_an_arena_keeps_its_memory() -> None:
    """Nothing of a forward outlives it but the arena, and its logits are a view of that."""
    model = decoder("llama", torch.bfloat16)
    arena = arena_of(model)
    driver = Driver(model, arena=arena)
    driver.step({"a": random_tokens(60, 1024, seed=2)})
    step, _ = driver.tensors({"a": [5]})
    model.forward(step, driver.kv, arena)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    logits = model.forward(step, driver.kv, arena)
    assert torch.cuda.memory_allocated() == before
    assert logits.data_ptr() in {room.data_ptr() for room in vars(arena).values() if isinstance(room, torch.Tensor)}


def microseconds(work: Callable[[], object], *, num_runs: int = 50) -> float:
    """Of one call in a graph of many, without the time that its launch takes the host."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_runs):
            work()
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / num_runs)
    return sorted(times)[len(times) // 2]


def works(num_tokens: int) -> dict[str, Callable[[], object]]:
    """Each kernel at the sizes of a 7B Llama in float16; the last as decode rows, one token each."""
    hidden, intermediate, num_heads, head_dim, max_blocks = 4096, 11008, 32, 128, 256

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float16, device=CUDA)

    def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=CUDA)

    x, update, weight, normed = (
        draw(num_tokens, hidden),
        draw(num_tokens, hidden) * 1e-3,
        draw(hidden),
        draw(num_tokens, hidden),
    )
    qkv, query = draw(num_tokens, 3 * hidden), draw(num_tokens, num_heads, head_dim)
    keys, values = (
        draw(num_tokens // 16 + 1, 16, num_heads, head_dim),
        draw(num_tokens // 16 + 1, 16, num_heads, head_dim),
    )
    frequencies = torch.rand(head_dim // 2, device=CUDA)
    positions = torch.randint(0, 2048, (num_tokens,), device=CUDA)
    rope = RopePlan.for_step(rotary_table(frequencies, 1.0, 2048), positions, torch.float16)
    kv_indices = torch.arange(num_tokens, device=CUDA)
    norm = draw(2 * num_heads, head_dim)
    gate_up, gated = draw(num_tokens, 2 * intermediate), draw(num_tokens, intermediate)
    stages = Stages(StageLayout(num_tokens, num_tokens, max_blocks, 14), 1, CUDA)
    for slot in range(num_tokens):
        stages.write_row(0, slot, slot, 300, slot, slot + 1, IS_SAMPLED | IS_LAST)
    source = StepSource(
        stages.layout,
        stages.tensor,
        zeros(1),
        zeros(num_tokens) + 7,
        zeros(num_tokens, max_blocks, dtype=torch.int32),
        zeros(num_tokens, 14, dtype=torch.int32),
    )
    step = {
        "row_slots": zeros(num_tokens),
        "is_sampled": zeros(num_tokens),
        "token_ids": zeros(num_tokens),
        "positions": zeros(num_tokens),
        "kv_indices": zeros(num_tokens),
        "block_tables": zeros(num_tokens, max_blocks, dtype=torch.int32),
        "context_lens": zeros(num_tokens, dtype=torch.int32),
        "query_starts": zeros(num_tokens + 1, dtype=torch.int32),
        "last_indices": zeros(num_tokens),
    }
    return {
        "rms_norm": lambda: rms_norm(x, weight, 1e-5, normed),
        "add_rms_norm": lambda: add_rms_norm(x, update, weight, 1e-5, normed),
        "rope_and_write_kv": lambda: rope_and_write_kv(qkv, rope, kv_indices, keys, values, out=query),
        "rope_and_write_kv, normed": lambda: rope_and_write_kv(
            qkv, rope, kv_indices, keys, values, query_key_norm=norm, epsilon=1e-5, out=query
        ),
        "gated_activation": lambda: gated_activation(gate_up, "silu", gated),
        "prepare_step": lambda: prepare_step(source, **step, block_size=16),
    }


def test_times() -> None:
    """Prints microseconds of each kernel in a graph; none may take longer than the matrix products that it stands between."""
    sizes = (1, 64, 512)
    times = {size: {name: microseconds(work) for name, work in works(size).items()} for size in sizes}
    print(f"\n{torch.cuda.get_device_name()}, microseconds at tokens: " + ", ".join(map(str, sizes)))
    for name in times[1]:
        print(f"  {name:<28}" + "".join(f"{times[size][name]:8.2f}" for size in sizes))
    assert all(time < 100 for row in times.values() for time in row.values())

"""Checkpoints: what is damaged is named and never restored, and what a crash leaves behind spoils nothing."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from minigrpo.config import UsageError
from minigrpo.runtime import checkpoint
from minigrpo.runtime.checkpoint import Checkpoints, check_same_run, read_params
from minigrpo.runtime.digest import begin_digests, on_device, on_devices, on_host
from minigrpo.runtime.mesh import HOST_MEMORY


def state_after(step):
    """Noise that compresses, and arrays of every dtype that a training state has."""
    rows = np.random.default_rng(step).normal(size=(2, 24, 16))
    return {
        "params": {"a": jnp.asarray(rows, jnp.float32), "b": jnp.asarray(rows[0], jnp.bfloat16)},
        "moments": [jnp.asarray(rows[1], jnp.float32), jnp.arange(7, dtype=jnp.int8)],
        "updates": jnp.asarray(step, jnp.int32),
    }


LIKE = jax.tree.map(jnp.zeros_like, state_after(0))


def equal(state, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run folder with checkpoints of steps 3, 6 and 9."""
    run = tmp_path_factory.mktemp("original")
    checkpoints = Checkpoints(run / "checkpoints", 9)
    for step in (3, 6, 9):
        checkpoints.save(step, state_after(step), {"skipped": step})
    checkpoints.close()
    return run


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def opened(run, **options):
    return Checkpoints(run / "checkpoints", 9, **options)


def test_a_state_comes_back_with_its_counters(run):
    step, state, host = opened(run).restore(LIKE)
    assert step == 9 and host == {"skipped": 9} and equal(state, state_after(9))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, LIKE)


STRAY = {
    "an empty newest folder": lambda steps: (steps / "99").mkdir(),
    "a newest folder with strange files": lambda steps: [(steps / "99").mkdir(), (steps / "99/x").write_text("x")],
    "no default": lambda steps: [shutil.copytree(steps / "9", steps / "12"), shutil.rmtree(steps / "12/default")],
    "no manifest": lambda steps: [shutil.copytree(steps / "9", steps / "12"), shutil.rmtree(steps / "12/manifest")],
    "another step's folder": lambda steps: shutil.copytree(steps / "9", steps / "12"),
    "a half-deleted newest": lambda steps: [
        shutil.copytree(steps / "9", steps / "12"),
        *[path.unlink() for path in sorted((steps / "12").rglob("d/*"))],
    ],
}


def in_host_memory(state):
    """The state with its moments in the host's memory, as --offload_optimizer keeps them."""
    moments = [jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST_MEMORY)) for leaf in state["moments"]]
    return state | {"moments": moments}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_state_comes_back_into_the_memory_that_is_wanted(tmp_path, saved, wanted):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9)
    checkpoints.save(1, in_host_memory(state_after(1)) if saved else state_after(1))
    checkpoints.close()
    _, state, _ = opened(tmp_path).restore(in_host_memory(LIKE) if wanted else LIKE)
    assert equal(state, state_after(1))
    kinds = {leaf.sharding.memory_kind for leaf in state["moments"]}
    assert (kinds == {HOST_MEMORY}) == wanted and state["updates"].sharding.memory_kind != HOST_MEMORY


@pytest.mark.parametrize("name", STRAY)
def test_a_folder_that_is_no_checkpoint_spoils_nothing(run, name, capfd):
    STRAY[name](run / "checkpoints")
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
    checkpoints = opened(run)
    step, state, _ = checkpoints.restore(LIKE)
    assert step == 9 and equal(state, state_after(9))
    assert (run / f"unusable-checkpoint-{newest}").is_dir()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and f"checkpoints/{newest} is not usable, trying the one before" in lines[0]
    checkpoints.save(newest, state_after(newest))
    checkpoints.close()
    assert opened(run).restore(LIKE)[0] == newest


def test_files_and_folders_with_other_names_are_left_where_they_are(run):
    (run / "checkpoints" / "notes").mkdir()
    (run / "checkpoints" / "77").write_text("a file")
    assert opened(run).restore(LIKE)[0] == 9
    assert (run / "checkpoints" / "notes").is_dir() and (run / "checkpoints" / "77").is_file()


def test_a_folder_made_while_the_run_goes_on_is_set_aside(run):
    checkpoints = opened(run)
    checkpoints.restore(LIKE)
    (run / "checkpoints" / "12").mkdir()
    checkpoints.save(12, state_after(12))
    checkpoints.close()
    assert opened(run).restore(LIKE)[0] == 12 and (run / "unusable-checkpoint-12").is_dir()


def test_no_flipped_bit_is_restored_in_silence(run, capfd):
    """A bit anywhere in the newest: either the state is the one saved, or the one before is taken and says so."""
    choice = random.Random(7)
    files = sorted(path for path in (run / "checkpoints" / "9").rglob("*") if path.is_file())
    fell_back = 0
    for path in [*files, *choice.choices(files, [path.stat().st_size for path in files], k=30)]:
        kept = path.read_bytes()
        damaged = bytearray(kept)
        damaged[choice.randrange(len(kept))] ^= 1 << choice.randrange(8)
        path.write_bytes(damaged)
        step, state, _ = opened(run).restore(LIKE)
        assert equal(state, state_after(step)), path
        if step == 6:
            fell_back += 1
            assert "9 is not usable" in capfd.readouterr().err
            (run / "unusable-checkpoint-9").rename(run / "checkpoints" / "9")
        path.write_bytes(kept)
    assert fell_back > 15 and "Traceback" not in capfd.readouterr().err


def test_a_model_read_from_a_damaged_checkpoint_is_refused(run):
    like = LIKE["params"]
    assert equal(read_params(run / "checkpoints" / "9", like), state_after(9)["params"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like)
    assert read_params(run / "checkpoints" / "9", half)["a"].dtype == jnp.bfloat16
    data = max((run / "checkpoints" / "9" / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises(UsageError, match="9: not a usable checkpoint .*; name another one"):
        read_params(run / "checkpoints" / "9", like)
    with pytest.raises(UsageError, match="6: is another model's .params/a is .2, 24, 16. there and .3,. here"):
        read_params(run / "checkpoints" / "6", {"a": jnp.zeros(3)})


def rewritten(path, **changes):
    """A manifest that is whole and says something else."""
    content = json.loads(path.read_text())
    del content["seal"]
    content |= changes
    path.write_text(json.dumps(content | {"seal": checkpoint.seal(content)}))


def test_a_newer_versions_checkpoint_is_refused_and_not_moved(run):
    rewritten(run / "checkpoints" / "9" / checkpoint.MANIFEST, format=2)
    with pytest.raises(UsageError, match="9: written by a newer minigrpo"):
        opened(run).restore(LIKE)
    assert (run / "checkpoints" / "9").is_dir()


@pytest.mark.parametrize("change", [{"b": jnp.zeros(3)}, {"params": {"a": jnp.zeros((2, 24, 8))}}])
def test_another_models_checkpoints_are_refused_and_not_moved(run, change):
    with pytest.raises(UsageError, match="9 is another model's .*check --model"):
        opened(run).restore(LIKE | change)
    assert len(list((run / "checkpoints").iterdir())) == 3


def write_metrics(run, steps):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n + 1}) + "\n" for n in range(steps)))


@pytest.mark.parametrize(
    ("steps", "marked", "refused"), [(12, False, True), (4, True, True), (1, True, True), (4, False, False)]
)
def test_checkpoints_that_are_gone_are_missed(tmp_path, steps, marked, refused):
    """A run killed before its first checkpoint begins again; one whose checkpoints were deleted does not."""
    write_metrics(tmp_path / "run", steps)
    if marked:
        (tmp_path / "run" / checkpoint.MARKER).write_text("3\n")
    checkpoints = opened(tmp_path / "run", save_steps=3)
    if not refused:
        assert checkpoints.restore(LIKE)[0] == 0
        return
    said = "newest_checkpoint.txt names checkpoint 3" if marked else f"metrics.jsonl has {steps} steps"
    with pytest.raises(UsageError, match=f"{said}, but .* holds no checkpoint"):
        checkpoints.restore(LIKE)


def test_the_limit_holds_after_a_kill(run):
    leftovers = ("12.orbax-checkpoint-tmp", "12.orbax-checkpoint-tmp-77", "3.deleted")
    for name in leftovers:
        (run / "checkpoints" / name / "default").mkdir(parents=True)
    checkpoints = Checkpoints(run / "checkpoints", 2)
    assert checkpoints.restore(LIKE)[0] == 9
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"6", "9"}


def test_the_limit_holds_while_the_run_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for step in range(1, 5):
        checkpoints.save(step, state_after(step))
        checkpoints.wait()
        assert checkpoints.steps() == [max(1, step - 1), step][-min(2, step) :]
        assert (tmp_path / checkpoint.MARKER).read_text() == f"{step}\n"


@pytest.mark.parametrize(("metric", "best"), [("eval/accuracy", 2), ("-eval/accuracy", 3)])
def test_the_best_step_is_kept_beside_the_newest(tmp_path, metric, best):
    values = {1: 0.5, 2: 0.7, 3: 0.1, 4: 0.6, 5: 0.7, 6: 0.2}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, keep_best=metric)
    assert not checkpoints.rate(1, {"loss": 3.0}) and not checkpoints.rate(1, {"eval/accuracy": float("nan")})
    for step, value in values.items():
        checkpoints.rate(step, {"eval/accuracy": value})
        checkpoints.save(step, state_after(step))
        if step == 4:  # a resumed run remembers
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / "checkpoints", 1, keep_best=metric)
            assert checkpoints.restore(LIKE)[0] == 4
    checkpoints.close()
    assert checkpoints.steps() == [best, 6] and checkpoints.best.step == best


@pytest.mark.parametrize("metric", ["nonsense", "eval/nonsense"])
def test_a_best_by_no_metric_is_refused(tmp_path, metric):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, keep_best=metric)
    own, other = {"loss": 1.0, "reward": 0.5}, {"eval/accuracy": 0.5}
    own, other = (other, own) if metric.startswith("eval/") else (own, other)
    assert not checkpoints.rate(1, other)
    with pytest.raises(UsageError, match=f"--keep_best={metric}: no such metric; there are "):
        checkpoints.rate(1, own)


def test_another_metric_or_a_best_that_is_gone_is_not_remembered(run):
    rewritten(run / "checkpoints/9" / checkpoint.MANIFEST, best={"metric": "eval/loss", "step": 1, "value": 0.5})
    checkpoints = opened(run, keep_best="eval/loss")
    checkpoints.restore(LIKE)
    assert checkpoints.best is None and checkpoints.rate(10, {"eval/loss": 0.1})


def test_checkpoints_are_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints = opened(tmp_path, save_steps=4, save_minutes=10.0)
    assert [step for step in range(1, 9) if checkpoints.due(step)] == [4, 8]
    now[0] += 601
    assert checkpoints.due(9)
    checkpoints.save(9, state_after(9))
    assert not checkpoints.due(10)
    checkpoints.close()
    assert not opened(tmp_path / "x", save_steps=0, save_minutes=0.001).due(1)


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["sync_tree", "sync", "write_whole"])
def test_a_disk_that_fills_while_saving_is_one_line_and_harms_no_earlier_checkpoint(run, monkeypatch, where, capfd):
    checkpoints = opened(run)
    checkpoints.restore(LIKE)
    monkeypatch.setattr(checkpoint, where, full_disk)
    with pytest.raises(UsageError) as caught:
        checkpoints.save(12, state_after(12))
        checkpoints.close()
    text = str(caught.value)
    assert "\n" not in text and "No space left on device, about 5." in text and "KiB needed" in text
    assert "make room there, then continue with --resume" in text and capfd.readouterr().err == ""
    monkeypatch.undo()
    step, state, _ = opened(run).restore(LIKE)
    assert equal(state, state_after(step)) and step in (9, 12) and (where != "sync_tree" or step == 9)


def test_a_limit_that_tensorstore_meets_is_one_line_and_harms_no_earlier_checkpoint(run, capfd):
    """The system refuses files above 20,000 bytes: the error comes from tensorstore's own threads."""
    import resource
    import signal

    checkpoints, before = opened(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.restore(LIKE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=50_000)), "b": jnp.ones(50_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UsageError, match="File too large, about 391 KiB needed.; raise the limit on the size of"):
            checkpoints.save(12, large)
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert capfd.readouterr().err == ""
    assert opened(run).restore(LIKE)[0] == 9 and len(list((run / "checkpoints").iterdir())) == 3


def test_a_folder_that_is_gone_or_a_file_is_one_line(run, tmp_path, capfd):
    checkpoints = opened(run)
    checkpoints.restore(LIKE)
    shutil.rmtree(run)
    run.write_text("a file now")
    with pytest.raises(UsageError, match="cannot be written .*continue with --resume"):
        checkpoints.save(12, state_after(12))
        checkpoints.close()
    assert capfd.readouterr().err == ""


def test_a_failure_in_the_background_is_raised_at_the_next_step(tmp_path):
    checkpoints = opened(tmp_path, save_steps=1)
    checkpoints.failure = OSError(28, "No space left on device")
    with pytest.raises(UsageError, match="No space left"):
        checkpoints.due(1)
    assert checkpoints.due(2)


@pytest.mark.parametrize(("free", "short"), [(1e12, False), (1000, True)])
def test_the_space_a_run_needs_is_told(tmp_path, monkeypatch, free, short):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: free)
    line = Checkpoints(tmp_path / "checkpoints", 2).space(LIKE)
    assert line.startswith("checkpoints: up to 5.3 KiB each, 3 at once") and ("too little: make room" in line) == short


# Digests


def independent_digest(array):
    """The definition, element by element, in Python's own integers."""

    def weight(position, salt):
        x = (position + salt) * 0x9E3779B1 % 2**32
        x = (x ^ x >> 15) * 0x85EBCA77 % 2**32
        return (x ^ x >> 13) | 1

    flat = np.atleast_1d(np.asarray(array))
    words = flat.view(f"u{flat.dtype.itemsize}").reshape(-1, flat.shape[-1])
    total = 0
    for row, values in enumerate(words):
        for column, word in enumerate(values):
            total += int(word) * weight(row, 0x243F6A88) * weight(column, 0x85A308D3)
    return total % 2**32


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), "int32"),
        ((1,), "float32"),
        ((5,), "bool"),
        ((8, 8), "bfloat16"),
        ((16, 3, 8), "int8"),
        ((4, 2, 3, 5), "float32"),
    ],
)
def test_a_digest_is_the_same_on_the_host_on_the_device_and_by_hand(shape, dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9, dtype)
    assert on_host(array) == int(jax.jit(on_device)(array)) == independent_digest(array)


@pytest.mark.parametrize("spec", [("fsdp", "tp"), ("tp", None), (None, ("fsdp", "tp")), (None, None)])
def test_a_digest_depends_on_no_mesh(spec):
    array = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8, 16)), jnp.float32)
    placed = jax.device_put(array, NamedSharding(mesh_of(2, 4), PartitionSpec(*spec)))
    assert on_host(placed) == int(jax.jit(on_device)(placed)) == on_host(array)
    assert begin_digests({"a": placed, "none": jnp.zeros((0, 4))})() == {"a": on_host(array), "none": 0}


def test_a_digest_of_an_array_in_the_hosts_memory_is_the_same():
    arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state_after(3)))}
    moved = {name: jax.device_put(x, x.sharding.with_memory_kind(HOST_MEMORY)) for name, x in arrays.items()}
    assert on_devices(moved) == on_devices(arrays) == begin_digests(arrays)() == begin_digests(moved)()


def test_a_save_within_a_rollout_gives_the_devices_no_program(monkeypatch, tmp_path):
    """An accelerator would run it after the rollout. Some arrays here have copies on other devices."""
    mesh = mesh_of(2, 2)
    specs = {"whole": PartitionSpec(), "rows": PartitionSpec("fsdp"), "columns": PartitionSpec(None, "tp")}
    state = {name: jax.device_put(jnp.ones((64, 256)), NamedSharding(mesh, spec)) for name, spec in specs.items()}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9)
    monkeypatch.setattr(checkpoint, "begin_digests", lambda arrays: on_devices(arrays).copy)
    checkpoints.begin_digests(3, state)
    launched = []
    monkeypatch.setattr(jax.lax, "slice_in_dim", lambda *_, **__: launched.append("slices of copies"))
    monkeypatch.setattr(checkpoint, "begin_digests", lambda *_: launched.append("digests"))
    checkpoints.save(3, state, {})
    checkpoints.close()
    monkeypatch.undo()
    assert not launched
    assert equal(opened(tmp_path).restore(jax.tree.map(jnp.zeros_like, state))[1], state)


def test_two_elements_changing_places_change_a_digest():
    array = jnp.arange(64.0).reshape(8, 8)
    for other in (array[::-1], array[:, ::-1], array.T, array.at[2, 3].set(array[2, 4]).at[2, 4].set(array[2, 3])):
        assert on_host(other) != on_host(array)


# The settings of a run that goes on

SETTINGS = {"learning_rate": 0.1, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_steps": 10, "num_epochs": 1.0}


def written(folder, **changes):
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"eval_steps": 0, "mesh": "1,1"} | changes))
    return folder


@pytest.mark.parametrize(
    "change",
    [{}, {"eval_steps": 5}, {"mesh": "2,1"}, {"save_minutes": 3.0}, {"offload_optimizer": "true"}, {"max_steps": 20}],
)
def test_what_changes_no_result_may_differ(tmp_path, change):
    assert check_same_run(written(tmp_path), SETTINGS | {"eval_steps": 0, "mesh": "1,1"} | change) == []


@pytest.mark.parametrize("change", [{"learning_rate": 1.0}, {"max_steps": 5}, {"max_steps": 0}, {"num_epochs": 0.5}])
def test_what_changes_results_may_not(tmp_path, change):
    name, value = next(iter(change.items()))
    with pytest.raises(UsageError, match=f"is another run; it differs in --{name}={value} .was"):
        check_same_run(written(tmp_path), SETTINGS | {"eval_steps": 0, "mesh": "1,1"} | change)


def test_a_longer_run_with_a_schedule_says_what_follows(tmp_path):
    now = SETTINGS | {"eval_steps": 0, "mesh": "1,1", "lr_schedule": "warmup_cosine"}
    (note,) = check_same_run(written(tmp_path, lr_schedule="warmup_cosine"), now | {"max_steps": 30})
    assert "--max_steps=30 (was 10): the warmup_cosine schedule spans the new length" in note


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_runs_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match="--resume: .*config.json is not"):
        check_same_run(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match="holds no run"):
        check_same_run(tmp_path / "none", SETTINGS)

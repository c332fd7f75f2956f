"""Config files, the names that people type, and --help: what reaches the settings, and which line a mistake gets."""

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import yaml
from conftest import ROOT

from minigrpo.command_line import FIRST_FLAGS, command_footer, help_text, parse_flags
from minigrpo.commands import COMMANDS
from minigrpo.config import (
    SECTION_NAMES,
    TRAIN_DEFAULTS,
    OptimizerOptions,
    Settings,
    UsageError,
    make_settings,
    section_types,
)
from minigrpo.config_files import RECIPES, shipped_recipes
from minigrpo.data.columns import COMPLETION_COLUMNS
from minigrpo.other_names import OTHER_NAMES
from minigrpo.runtime.run_folder import save_settings

FLAGS = {
    name: {field.name for options in section_types(about.sections, Settings).values() for field in fields_of(options)}
    for fields_of in (dataclasses.fields,)
    for name, about in COMMANDS.items()
}
EVERY_FLAG = set().union(*FLAGS.values())


def parse(*argv, command="train"):
    return parse_flags(list(argv), COMMANDS[command].sections)


def write(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def problem(*argv, command="train"):
    with pytest.raises(UsageError) as caught:
        parse(*argv, command=command)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# What a file says reaches the settings


def test_flat_files_sections_and_json_say_the_same(tmp_path):
    values = {"temperature": 0.7, "learning_rate": 1e-5, "model": "builtin:tiny", "slots": 32, "packing": False}
    flat = write(tmp_path, "# mine\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    by_section = write(
        tmp_path,
        "model: {model: builtin:tiny}\nrollout:\n  temperature: 0.7\n  slots: 32\noptimizer:\n  learning_rate: 1e-5\n"
        "steps: {packing: false}\nloss:\n",
        "sections.yml",
    )
    as_json = write(tmp_path, json.dumps(values), "mine.json")
    wanted = parse("--temperature=.7", "--learning_rate=1e-5", "--model=builtin:tiny", "--slots=32", "--nopacking")
    for path in (flat, by_section, as_json):
        found = parse(f"--config={path}")
        assert found.as_dict() == wanted.as_dict() and found.explicit == wanted.explicit == set(values)
        assert found.from_file == set(values) and not wanted.from_file


def test_flags_win_over_files_later_files_over_earlier_and_all_over_a_models_own_defaults(tmp_path):
    first = write(tmp_path, "temperature: 0.5\nbeta: 0.5\nseed: 1\nmax_steps: 7", "first.yaml")
    second = write(tmp_path, "beta: 0.25\nseed: 2", "second.yaml")
    found = parse("--seed=3", f"--config={first}", f"--config={second}")
    assert (found.rollout.temperature, found.loss.beta, found.steps.seed) == (0.5, 0.25, 3)
    assert found.from_file == {"temperature", "beta", "max_steps"}
    kept = found.with_defaults(TRAIN_DEFAULTS["builtin:tiny"])
    assert (kept.rollout.temperature, kept.loss.beta, kept.steps.max_steps) == (0.5, 0.25, 7)
    assert kept.optimizer.learning_rate == TRAIN_DEFAULTS["builtin:tiny"]["learning_rate"]


def test_a_flag_takes_the_place_of_a_files_other_way_to_say_it(tmp_path):
    file = write(tmp_path, "max_steps: 7\nwarmup_ratio: 0.3")
    found = parse(f"--config={file}", "--num_epochs=2", "--warmup_steps=5")
    assert (found.steps.max_steps, found.steps.num_epochs) == (0, 2.0)
    assert (found.optimizer.warmup_ratio, found.optimizer.warmup_steps) == (None, 5)
    assert parse(f"--config={file}", "--num_epochs=2", "--max_steps=3").steps.max_steps == 3
    assert problem("--warmup_steps=5", "--warmup_ratio=0.1").startswith("--warmup_steps=5: --warmup_ratio=0.1 is given")
    both = write(tmp_path, "warmup_steps: 5\nwarmup_ratio: 0.1", "both.yaml")
    assert problem(f"--config={both}").startswith(f"{both}: warmup_steps=5: --warmup_ratio=0.1 is given too")


def test_words_and_numbers_are_those_of_yaml_1_2(tmp_path):
    text = "learning_rate: 3e-6\nbeta: 0\nseed: 010\nmesh: 4,2\nsystem_prompt: no\noutput_dir: 2026-11-29\n"
    found = parse(f"--config={write(tmp_path, text + 'run_name_is: ~'.replace('run_name_is', 'epsilon_high'))}")
    assert found.optimizer.learning_rate == 3e-6 and found.steps.seed == 10 and found.run.mesh == "4,2"
    assert found.data.system_prompt == "no" and found.run.output_dir == "2026-11-29"
    assert found.loss.beta == 0.0 and type(found.loss.beta) is float and "epsilon_high" not in found.explicit
    text = "system_prompt: |\n  One.\n  Two \\n.\nshare_prompts: true\nslots: '16'\nlora_targets: q_proj,v_proj"
    found = parse(f"--config={write(tmp_path, text)}")
    assert found.data.system_prompt == "One.\nTwo \\n.\n" and found.steps.share_prompts == "true"
    assert found.rollout.slot_limit == 16 and found.lora.lora_targets == "q_proj,v_proj"


def test_the_config_of_a_run_begins_another_and_serves_other_commands(tmp_path, capsys):
    run = parse("--temperature=0.5", "--epsilon_high=0.3", "--resume", f"--output_dir={tmp_path}", "--warmup_steps=4")
    save_settings(tmp_path, run)
    again = parse(f"--config={tmp_path}/config.json", "--output_dir=new")
    same = dataclasses.replace(run.run, resume=False, output_dir="new")
    assert again.as_dict() == (run.as_dict() | dataclasses.asdict(same))
    flags = parse(f"--flagfile={tmp_path}/flags.txt", "--output_dir=new")
    assert flags.as_dict() == again.as_dict() and capsys.readouterr().err == ""
    evaluated = parse(f"--config={tmp_path}/config.json", "--model=runs/mine", command="evaluate")
    assert evaluated.rollout.temperature == 0.5 and evaluated.model.model == "runs/mine"
    note = capsys.readouterr().err
    assert (
        note.startswith(f"note: {tmp_path}/config.json: not flags of this command, ignored: ") and note.count("\n") == 1
    )
    named = set(note.split("ignored: ")[1].strip().split(", "))
    assert named == json.loads((tmp_path / "config.json").read_text()).keys() - FLAGS["evaluate"]


def test_a_section_of_another_command_says_nothing_here(tmp_path, capsys):
    file = write(tmp_path, "sft: {batch_size: 3, max_steps: 5}\nsteps: {batch_size: 4}\nseed: 6")
    assert (parse(f"--config={file}").steps.batch_size, parse(f"--config={file}").steps.max_steps) == (4, 0)
    assert "ignored: batch_size, max_steps\n" in capsys.readouterr().err
    warm = parse(f"--config={file}", command="sft").sft
    assert (warm.batch_size, warm.max_steps, warm.seed) == (3, 5, 6)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_file_of_all_its_flags(tmp_path, command):
    whole = make_settings({}, COMMANDS[command].sections)
    save_settings(tmp_path, whole)
    read = parse(f"--config={tmp_path}/config.json", command=command)
    assert read.as_dict() == whole.as_dict()
    assert read.explicit == {name for name, value in whole.as_dict().items() if value is not None}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_without_flags_gives_the_defaults(command):
    found = parse(command=command)
    assert not found.explicit and found.as_dict() == make_settings({}, COMMANDS[command].sections).as_dict()


# Mistakes in a file


BAD_FILES = {
    "unknown": ("learning_rat: 1", "learning_rat: no such key; did you mean learning_rate?"),
    "dashes": ("learning-rate: 1", "learning-rate: no such key; did you mean learning_rate?"),
    "nothing like it": ("zzz: 1", "zzz: no such key"),
    "other library": ("per_device_train_batch_size: 1", "no such key; use --batch_size, which counts prompts per step"),
    "unknown in a section": (
        "rollout: {temprature: 1}",
        "temprature: no such key in rollout; did you mean temperature",
    ),
    "of another section": ("rollout: {beta: 1}", "beta: no such key in rollout; it belongs to loss"),
    "unknown section": ("rolout: {temperature: 1}", "rolout is no section; did you mean rollout?"),
    "no section": ("zzz: {temperature: 1}", "zzz is no section; the sections are model, lora, data"),
    "section without keys": ("optimizer: 5", "optimizer is a section; write its flags below it"),
    "text for a number": ("temperature: hot", "temperature='hot': must be a number"),
    "quoted number": ("learning_rate: '1e-5'", "learning_rate='1e-5': must be a number"),
    "fraction": ("batch_size: 1.5", "batch_size=1.5: must be a whole number"),
    "word for a flag": ("resume: yes", "resume='yes': must be true or false"),
    "number for text": ("model: 5", "model=5: must be text"),
    "truth for a number": ("seed: true", "seed=True: must be a whole number"),
    "truth for text": ("dataset: false", "dataset=False: must be text"),
    "nothing": ("temperature:", "temperature: must be one value, not nothing"),
    "list": ("mesh: [4, 2]", "mesh: must be one value, not a list; write it with commas, such as 4,2"),
    "mapping": ("rollout: {top_k: {a: 1}}", "top_k: must be one value, not a mapping"),
    "limit": ("temperature: -1", "temperature=-1.0: must be at least 0.0"),
    "choice": ("loss: {loss_type: ppo}", "loss_type=ppo: must be one of grpo, bnpo"),
    "together": ("kl_estimator: k1", "kl_estimator=k1: as a loss its expected gradient is zero"),
    "huge": ("beta: 1" + "0" * 400, "beta=inf: must be a finite number"),
    "endless digits": ("seed: 1" + "0" * 5000, "Exceeds the limit"),
    "twice": ("seed: 1\nbeta: 0\nseed: 1", "seed is given twice; leave one of them out"),
    "twice in a section": ("steps: {seed: 1, seed: 2}", "seed is given twice"),
    "flat and in a section": ("seed: 1\nsteps: {seed: 2}", "seed is given twice, by itself and under steps"),
    "empty": ("", "holds no settings"),
    "comments": ("# nothing yet\n", "holds no settings"),
    "empty mapping": ("{}", "holds no settings"),
    "top list": ("- seed: 1", "must hold flags and their values, such as learning_rate: 1e-5, not a list"),
    "top word": ("--seed=1", "must hold flags and their values, such as learning_rate: 1e-5, not a single value"),
    "not yaml": ("seed: 1\n  beta: [2", "not readable YAML (line 2: "),
    "tab": ("rollout:\n\ttop_k: 1", "not readable YAML (line 2: "),
    "two documents": ("seed: 1\n---\nseed: 2", "not readable YAML (line 2: "),
    "tag": ("seed: !!python/object:os.system 1", "line 1: the tag tag:yaml.org,2002:python/object:os.system means"),
    "own tag": ("seed: !mine 1", "line 1: the tag !mine means nothing here"),
    "odd key": ("[1, 2]: 3", "line 1: a key must be a flag's name"),
    "number as a key": ("1: 3", "1: no such key"),
    "merge": ("a: &a {seed: 1}\n<<: *a", "a is no section"),
    "deep": ("[" * 3_000, "nested too deeply"),
    "control": ("seed: \x01", "not readable YAML"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_mistake_in_a_file_is_one_line_with_file_and_key(tmp_path, case):
    text, message = BAD_FILES[case]
    file = write(tmp_path, text)
    found = problem(f"--config={file}")
    assert found.startswith(f"{file}: ") and message in found, found


BAD_JSON = {
    "twice": ('{"seed": 1, "seed": 1}', "seed is given twice"),
    "cut": ('{"seed": 1', "not readable JSON (Expecting ',' delimiter"),
    "list": ("[1]", "not a list"),
    "not a number": ('{"beta": NaN}', "beta=nan: must be a finite number"),
    "null": ('{"beta": null}', "beta: must be one value, not nothing"),
    "deep": ('{"seed": ' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_mistake_in_json_is_one_line_too(tmp_path, case):
    text, message = BAD_JSON[case]
    found = problem(f"--config={write(tmp_path, text, 'a.json')}")
    assert found.startswith(f"{tmp_path}/a.json: ") and message in found, found


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    assert "--config=none.yaml: no such file, nor one of the shipped recipes: " in problem("--config=none.yaml")
    assert ", ".join(shipped_recipes()) in problem("--config=none.yaml") and problem("--config=").startswith(
        "--config=:"
    )
    (tmp_path / "config.json").write_text("{}")
    assert f"is a folder; name the file in it, such as {tmp_path}/config.json" in problem(f"--config={tmp_path}")
    (tmp_path / "latin.yaml").write_bytes("system_prompt: d\xe9j\xe0".encode("latin-1"))
    assert "latin.yaml: not UTF-8: " in problem(f"--config={tmp_path}/latin.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 20) + "\nseed: 1")
    assert "larger than 1 MB" in problem(f"--config={tmp_path}/big.yaml")
    laughs = "a: &a [x]\n" + "".join(
        f"{chr(97 + i)}: &{chr(97 + i)} [{f'*{chr(96 + i)}, ' * 9}]\n" for i in range(1, 20)
    )
    assert "a: no such key" in problem(f"--config={write(tmp_path, laughs)}")


# Names that people know from elsewhere


def test_no_other_name_is_a_flag_and_every_hint_names_flags_that_exist():
    assert not EVERY_FLAG & OTHER_NAMES.keys() and len(OTHER_NAMES) > 40
    for name, hint in OTHER_NAMES.items():
        named = set(re.findall(r"--(\w+)", hint))
        assert named <= EVERY_FLAG, (name, named - EVERY_FLAG)


TYPED = (
    "lr", "per_device_train_batch_size", "load_in_8bit", "load_in_4bit", "model_name", "model_name_or_path", "bf16",
    "fp16", "vllm_mode", "use_vllm", "vllm_gpu_memory_utilization", "torch_dtype", "mu", "epochs", "max_new_tokens",
    "reward_funcs", "reward_weights", "run_name", "gradient_checkpointing", "target_modules", "resume_from_checkpoint",
    "num_train_epochs", "lr_scheduler_type", "adam_beta1", "adam_beta2", "optim", "train_file", "validation_file",
    "vllm_importance_sampling_correction", "sync_ref_model", "ref_model_sync_steps", "eval_strategy", "hf_token",
    "per-device-train-batch-size", "LR", "attn_implementation", "peft_config", "use_peft", "steps_per_generation",
    "generation_batch_size", "load_best_model_at_end", "rollout_engine", "max_seq_length", "do_sample", "num_steps",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPED)
def test_a_name_of_another_library_gets_what_it_is_here_and_no_other_guess(tmp_path, name):
    for found in (problem(f"--{name}=1"), problem(f"--config={write(tmp_path, f'{name}: 1')}")):
        assert "did you mean" not in found.lower(), found
        assert re.search(r"no such (flag|key); \w+", found), found


BAD_LINES = {
    "misspelt": (["--max_step=1"], "--max_step: no such flag; did you mean --max_steps?"),
    "no dash": (["--max-steps=1"], "--max-steps: no such flag; did you mean --max_steps?"),
    "of other commands": (["--prompt=hello"], "--prompt: no such flag of this command; it belongs to generate"),
    "no value at the end": (["--seed=1", "--max_steps"], "--max_steps: needs a value, written --max_steps=VALUE"),
    "no value": (["--max_steps", "--seed=1"], "--max_steps: needs a value"),
    "no text": (["--model", "--seed=1"], "--model: needs a value"),
    "no file": (["--config"], "--config: needs a value"),
    "not a number": (["--max_steps=abc"], "--max_steps=abc: must be a whole number"),
    "empty": (["--max_steps="], "--max_steps=: must be a whole number"),
    "comma": (["--learning_rate=1,5"], "--learning_rate=1,5: must be a number"),
    "maybe": (["--resume=maybe"], "--resume=maybe: must be true or false"),
    "flag file": (["--flagfile=none.txt"], "--flagfile=none.txt: cannot be read (No such file or directory)"),
    "flag folder": (["--flagfile=/"], "--flagfile=/: cannot be read (Is a directory)"),
    "two for one": (["--resume", "true"], "unexpected argument 'true'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_mistake_on_the_command_line_is_one_clean_line(case):
    argv, message = BAD_LINES[case]
    found = problem(*argv)
    assert found.startswith(message) and "ERROR" not in found and found.endswith("(see --help)"), found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--max_steps=99999999999999999999", "--max_steps=9+: must be at most 2147483647"),
        ("--num_epochs=1e300", "--num_epochs=1e.300: must be at most"),
        ("--model=", "--model=: must not be empty"),
        ("--dataset=", "--dataset=: must not be empty"),
        ("--nooffline=true", "nooffline"),
        ("--wandb_project=x", "--wandb_project=x: means nothing without --report_to=wandb"),
        ("--keep_best=-accuracy", "write --keep_best=eval/accuracy"),
    ],
)
def test_values_that_cannot_be_meant_are_one_line(given, said):
    with pytest.raises(UsageError, match=said) as caught:
        parse_flags([given], COMMANDS["train"].sections)
    assert "\n" not in str(caught.value)


def test_a_flag_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "flags.txt").write_bytes(b"\xff\xfe--seed=1")
    assert problem(f"--flagfile={tmp_path}/flags.txt").startswith(f"--flagfile={tmp_path}/flags.txt: not UTF-8 text")


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_once_and_what_matters_first(command):
    types_by_name = section_types(COMMANDS[command].sections, Settings)
    page = help_text("x", "does", types_by_name.values(), command_footer(command))
    described = page.split("\n\nFiles:")[0]
    shown = re.findall(r"^  --(\w+)=", described, re.MULTILINE)
    assert sorted(shown) == sorted(FLAGS[command])
    if command in ("train", "plan"):
        wanted = [name for name in FIRST_FLAGS if name in FLAGS[command]]
        assert shown[: len(wanted)] == wanted and len(FIRST_FLAGS) == 10
    assert "Examples:" in page and all(recipe in page for recipe in shipped_recipes())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_is_understood(command, capsys):
    for example in COMMANDS[command].examples:
        assert parse(*shlex.split(example), command=command).explicit
    module = ast.parse((ROOT / "minigrpo" / f"{command}.py").read_text())
    named = [node.args[0].value for node in ast.walk(module) if getattr(node, "func", None) and is_start(node.func)]
    assert named == [command]
    assert set(COMMANDS[command].sections) <= set(SECTION_NAMES)


def is_start(function):
    return isinstance(function, ast.Name) and function.id == "run_named"


def test_the_help_of_sft_names_the_columns_that_it_tries():
    assert ", ".join(COMPLETION_COLUMNS) in COMMANDS["sft"].notes


@pytest.mark.parametrize(
    ("question", "answer"), [("--help", "usage: python -m minigrpo.train"), ("--version", "minigrpo ")]
)
def test_help_imports_nothing_heavy(question, answer):
    command = [sys.executable, "-X", "importtime", "-m", "minigrpo.train", question]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert result.returncode == 0 and answer in result.stdout and "yaml" in imported
    assert not imported & {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "matplotlib", "datasets", "tokenizers"}


# Recipes


def test_the_recipes_of_the_four_groups_are_shipped():
    names = {
        "tunix-gsm8k", "tunix-gsm8k-v6e-16", "trl-offline-qwen2.5-0.5b", "lora-scored-responses",
        "from-scratch-qwen2.5-1.5b",
    }  # fmt: skip
    assert set(shipped_recipes()) == names
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["minigrpo"]
    assert "recipes/*.yaml" in packed


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_read_and_says_what_it_is_for_and_what_memory_it_takes(name, capsys):
    text = (RECIPES / f"{name}.yaml").read_text()
    header = text.split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines()) and "PLANNED" not in text and "PHASES" not in text
    assert "# For: " in header and re.search(
        rf"minigrpo\.plan --config={re.escape(name)} --topology=(v6e|gpu):", header
    )
    assert re.search(r"update \d+\.\d", header) and re.search(r"minigrpo \d+\.\d+\.\d+", header)
    settings = parse(f"--config={name}")
    assert settings.explicit == set(yaml.safe_load(text)) and capsys.readouterr().err == ""
    assert parse(f"--config={name}.yaml", "--seed=3").steps.seed == 3


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_serves_plan_too(name):
    plan = parse(f"--config={name}", command="plan")
    train = parse(f"--config={name}")
    assert plan.steps == train.steps and plan.lora == train.lora and plan.rollout == train.rollout
    assert plan.plan.eval_steps == train.run.eval_steps


def test_the_recipes_have_their_groups_settings():
    tunix, pod = parse("--config=tunix-gsm8k"), parse("--config=tunix-gsm8k-v6e-16")
    assert (tunix.optimizer.learning_rate, tunix.rollout.temperature, tunix.loss.beta) == (3e-6, 0.9, 0.08)
    assert (tunix.run.mesh, pod.run.mesh, tunix.rewards.reward) == ("4,2", "8,2", "answer,think_format")
    assert dataclasses.replace(tunix, run=pod.run, steps=pod.steps) == dataclasses.replace(pod, explicit=tunix.explicit)
    lora = parse("--config=lora-scored-responses")
    assert lora.data.offline and (lora.lora.lora_rank, lora.lora.lora_alpha, lora.lora.lora_dropout) == (16, 32.0, 0.05)
    assert lora.optimizer.warmup_steps == 200 and lora.model.quantize == "int8"
    trl = parse("--config=trl-offline-qwen2.5-0.5b")
    assert (trl.rollout.temperature, trl.rollout.top_p, trl.rollout.max_completion_length) == (0.7, 0.9, 192)
    scratch = parse("--config=from-scratch-qwen2.5-1.5b")
    assert scratch.rewards.reward == "correctness,tag_presence" and scratch.run.keep_best == "reward"


# Warming up


@pytest.mark.parametrize(
    ("options", "per_step", "updates"),
    [
        (OptimizerOptions(), 1, 10),
        (OptimizerOptions(warmup_ratio=0.5), 1, 50),
        (OptimizerOptions(warmup_ratio=0.0), 1, 0),
        (OptimizerOptions(warmup_steps=7), 1, 7),
        (OptimizerOptions(warmup_steps=7), 4, 28),
        (OptimizerOptions(warmup_steps=0), 1, 0),
        (OptimizerOptions(warmup_steps=200), 1, 200),
    ],
)
def test_the_rate_rises_for_the_steps_that_are_asked(options, per_step, updates):
    from minigrpo.grpo.optimizer import learning_rate

    assert options.warmup_updates(100, per_step) == updates
    rate = learning_rate(options, 100, per_step)
    rates = np.asarray(rate(np.arange(100))).tolist()
    assert rates.index(max(rates)) == min(updates, 99) and rates[: updates + 1] == sorted(rates[: updates + 1])

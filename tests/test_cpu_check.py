"""The check before a run: mistakes planted one at a time are found, and healthy runs raise no alarm."""

import json
import shutil
import time

import pytest
from conftest import ROOT

from minigrpo import check, train
from minigrpo.build import build
from minigrpo.command_line import parse_flags
from minigrpo.config import TRAIN_DEFAULTS
from minigrpo.data import probes

BUILTIN = ROOT / "minigrpo" / "builtin"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CHATML = json.loads((BUILTIN / "tokenizer_config.json").read_text())["chat_template"]
QWEN3 = CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
BOXED = r"--system_prompt=Reason step by step, and put your final answer within \\boxed{}."
THOUGHT = "--system_prompt=Think inside <think></think>, then give the answer after ####."
NUMBERS = [(17, 5), (3, 4), (40, 2), (8, 9), (25, 13), (6, 50), (31, 7), (12, 12), (70, 1), (5, 16), (2, 33), (9, 58)]

REWARDS = """
import re

def constant(completions, answer, **_):
    return [1.0 for _ in completions]

def length(completions, **_):
    return [len(text) / 1000 for text in completions]

def substring(completions, answer, **_):
    return [float(wanted.split("####")[-1].strip() in text) for text, wanted in zip(completions, answer)]

def inverted(completions, answer, **_):
    return [1.0 - score for score in substring(completions, answer)]

def fragile(completions, answer, **_):
    return [float(text.split()[-1] == wanted) for text, wanted in zip(completions, answer)]

def messages(completions, answer, **_):
    return [float(wanted in text[-1]["content"]) for text, wanted in zip(completions, answer)]

def texts(completions, answer, **_):
    return [float(re.search(r"\\d+", text) is not None) for text, wanted in zip(completions, answer)]

def forgotten(completions, **columns):
    truth = columns.get("ground_truth") or [""] * len(completions)
    return [float(bool(wanted) and wanted in text) for text, wanted in zip(completions, truth)]

def exact(completions, answer, **_):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def tagged(completions, answer, **_):
    found = [re.search(r"<solution>(.*?)</solution>", text, re.DOTALL) for text in completions]
    return [float(bool(hit) and hit[1].strip() == wanted) for hit, wanted in zip(found, answer)]

def labelled(completions, answer, **_):
    found = [re.search(r"My answer: (\\S+)", text) for text in completions]
    return [float(bool(hit) and hit[1] == wanted) for hit, wanted in zip(found, answer)]

def truth(completions, label, **_):
    return [float(text.rpartition(" ")[2].strip(".") == str(wanted)) for text, wanted in zip(completions, label)]

def opened(completions, answer, **_):
    return [float(text.startswith("<think>") and wanted in text) for text, wanted in zip(completions, answer)]

class Moody:
    __name__ = "moody"
    calls = 0
    def __call__(self, completions, **_):
        self.calls += 1
        return [(len(text) * 7 + self.calls * 3) % 5 for text in completions]

moody = Moody()

def generous(completions, answer, **_):
    return [2.0 if not text else 1.0 + (wanted in text) for text, wanted in zip(completions, answer)]

def none(completions, **_):
    return [None] * len(completions)

def short(completions, **_):
    return [-len(text) / 1000 for text in completions]
"""


def rows(**columns):
    """Problems with worked references as GSM8K has them; `columns` are functions of the two numbers."""
    made = [
        {
            "question": f"Ann has {a} pens. Then Ben gives Ann {b} more pens. How many pens does Ann have now?",
            "answer": f"Ann begins with {a} pens, and {a} + {b} = {a + b}.\n#### {a + b}",
        }
        for a, b in NUMBERS
    ]
    return [row | {name: of(*pair) for name, of in columns.items()} for row, pair in zip(made, NUMBERS, strict=True)]


def final(a, b):
    return str(a + b)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model without weights, a file of reward functions, and no key of any service."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.py").write_text(REWARDS)
    make_model()
    write(rows())
    return tmp_path


def make_model(template=CHATML, ends=(0, 2), positions=4096):
    from pathlib import Path

    folder = Path("model")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in FILES:
        shutil.copy(BUILTIN / name, folder)
    for name, change in (
        ("tokenizer_config.json", {"chat_template": template}),
        ("generation_config.json", {"eos_token_id": list(ends)}),
        ("config.json", {"max_position_embeddings": positions}),
    ):
        (folder / name).write_text(json.dumps(json.loads((BUILTIN / name).read_text()) | change))


def write(data, name="rows.jsonl"):
    from pathlib import Path

    Path(name).write_text("".join(json.dumps(row) + "\n" for row in data))


DEFAULTS = {"model": "model", "dataset": "rows.jsonl", "max_prompt_length": "512", "max_completion_length": "1024"}


def run(capsys, *flags):
    """Return the exit code and the last line of a check."""
    given = {flag.removeprefix("--").split("=")[0] for flag in flags}
    own = [f"--{name}={value}" for name, value in DEFAULTS.items() if name not in given]
    code = check.main(parse_flags([*own, *flags], check.SECTIONS))
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    shown = [line for line in lines if line.startswith(("ok ", "warn ", "fail "))]
    assert len(shown) == len(report["findings"]) and code == ("ok", "warn", "fail").index(report["status"])
    return code, report


def alarms(report):
    return [(found["name"], found["status"], found["text"]) for found in report["findings"] if found["status"] != "ok"]


def scored(scores):
    return [{"prompt": f"{a} + {b}?", "responses": ["It is 4.", "It is 5."], "scores": scores} for a, b in NUMBERS]


MISTAKES = {
    # reward functions
    "a reward that ignores the answer": ("--reward=mine.py:constant", "reward constant", "every answer"),
    "a reward of length alone": ("--reward=mine.py:length", "rewards together", "right and wrong answers earn"),
    "a reward that is the wrong way round": ("--reward=mine.py:inverted", "reward inverted", "wrong answers earn 1"),
    "a weight below zero": ("--reward=correctness*-1", "reward correctness", "wrong answers earn 0"),
    "a weight of zero": ("--reward=correctness*0,strict_format", "rewards together", "the same"),
    "a reward that fails on an empty answer": ("--reward=mine.py:fragile", "reward fragile", "on empty answers"),
    "a reward written for messages": ("--reward=mine.py:messages", "reward messages", "string indices"),
    "a reward written for text": (
        ["--reward=mine.py:texts", [row | {"prompt": [{"role": "user", "content": "?"}]} for row in rows()]],
        "reward texts", "raised",
    ),
    "a reward that reads a column that is not there": ("--reward=mine.py:forgotten", "reward forgotten", "gives 0"),
    "a reward that moods decide": ("--reward=correctness,mine.py:moody", "reward moody", "asked again"),
    "a reward that pays for silence": ("--reward=mine.py:generous", "reward generous", "empty answers earn 2"),
    "a reward that never applies": ("--reward=correctness,mine.py:none", "reward none", "None for every answer"),
    "an exact comparison with a worked reference": ("--reward=mine.py:exact", "format", "exact, which wants ####"),
    "whole numbers wanted, decimals given": (
        ["--reward=correctness,integer", rows(answer=lambda a, b: f"{a}.{b}5")], "reward integer", "leave integer out",
    ),
    # format
    "a prompt that asks for a box, rewards for tags": (BOXED, "format", "strict_format"),
    "a prompt that asks for tags, a reward for #### after a thought": (
        "--reward=answer,think_format", "format", "think_format",
    ),
    "a prompt that asks for nothing": ("--system_prompt=", "format", "asks for no format"),
    "an own tag that no prompt mentions": (["--reward=mine.py:tagged", rows(answer=final)], "format", "solution"),
    "own words that no prompt mentions": (["--reward=mine.py:labelled", rows(answer=final)], "format", "My answer:"),
    "a long answer that outweighs the right one": (
        "--reward=correctness,mine.py:length*9", "rewards together", "rambling answers earn",
    ),
    "thinking before tags that must come first": (
        ["--enable_thinking", QWEN3], "format", "strict_format",
    ),
    "a thought that the prompt has opened already": (
        ["--reward=mine.py:opened", rows(answer=final), OPENED], "reward opened", "gives 0",
    ),
    # data
    "answers in another column": (rows(answer=lambda a, b: "see below", final_answer=final), "reference answers", ""),
    "another answer than the final one": (
        rows(answer=lambda a, b: f"task {b}", ground_truth=final), "reference answers", "'ground_truth' says",
    ),
    "explanations as answers, the answer beside them": (
        rows(answer=lambda a, b: f"Ann has {a} pens and Ben gives {b} to her, so that " + "more " * 12, label=final),
        "reference answers", "short ones are in label",
    ),
    "an answer column that is not there": ("--answer_column=result", "data", "its columns are"),
    "no answers at all": ([{"question": f"{a} + {b}?"} for a, b in NUMBERS], "data", "answer"),
    "a row number as the answer": (
        [row | {"answer": str(i)} for i, row in enumerate(rows())], "reference answers", "as an index does",
    ),
    "the same answer everywhere": (rows(answer=lambda a, b: "7"), "reference answers", "12 of 12 are '7'"),
    "missing answers written as text": (rows(answer=lambda a, b: "nan" if a > 20 else final(a, b)), "reference", "nan"),
    "the prompt as the answer": ("--answer_column=question", "prompts", "reference answer"),
    "a prompt with its solution": (
        [row | {"question": row["question"] + row["answer"]} for row in rows()], "prompts", "hold their own",
    ),
    "the same prompt everywhere": (rows(question=lambda a, b: "How many?"), "prompts", "all are the same"),
    "prompts that are templated already": (
        rows(question=lambda a, b: f"<|im_start|>user\n{a} + {b}?<|im_end|>"), "prompts", "control tokens",
    ),
    "the test split": ("--dataset=gsm8k-test.jsonl", "split", "held-out data (test)"),
    "rows that say they are for validation": (rows(split=lambda a, b: "validation"), "split", "validation"),
    "prompts that are too long": (
        [*rows(), *rows(question=lambda a, b: f"{a} and {b} " * 300)], "prompts", "12 dropped",
    ),
    "held-out rows that are trained on": (
        ["--eval_steps=5", "--eval_dataset=rows.jsonl"], "held-out prompts", "12 are trained on too",
    ),
    "responses on file that all score the same": (["--offline", scored([1.0, 1.0])], "scores", "100%"),
    # template and ends
    "a template without an end token": (
        CHATML.replace("<|im_end|>\n", "\n\n"), "end token", "no end token",
    ),
    "a base model with a chat template": ({"ends": [0]}, "end token", "the checkpoint's own end is <|endoftext|>"),
    "a template that does not open a turn": (
        CHATML.partition("{% if add_generation_prompt")[0], "chat template", "open the assistant",
    ),
    "a template that leaves the system prompt out": (
        CHATML.replace("messages %}", "messages if message.role != 'system' %}"), "chat template", "system prompt",
    ),
    # limits, sampling, machine
    "a limit shorter than the answers": ("--max_completion_length=32", "lengths", "raise it to"),
    "no room for thinking": (["--enable_thinking", "--max_completion_length=500", THOUGHT, QWEN3], "thinking", ""),
    "nearly greedy sampling": ("--temperature=0.01", "sampling", "nearly equal"),
    "one token to choose from": ("--top_k=1", "sampling", "nearly equal"),
    "a learning rate of the wrong size": ("--learning_rate=0.05", "learning rate", "far above"),
    "a batch of many times the data": ("--batch_size=100", "batch", "about 8 times"),
    "a greedy policy": ("--temperature=0", "settings", "--temperature=0"),
    "a folder that holds a run": ("--output_dir=model", "disk", "not empty"),
    "a folder that is a file": ("--output_dir=mine.py/run", "disk", "is a file"),
    "a sink without its key": ("--report_to=wandb", "keys", "WANDB_API_KEY is not set"),
    "a repository without a key": ("--push_to_hub=me/model", "keys", "HF_TOKEN is not set"),
    "a model that is not there": ("--model=./nothing", "model", "nothing"),
    "a reward that is not there": ("--reward=mine.py:corectness", "data", "no function"),
}  # fmt: skip
"""What is done wrong -> flags, rows, a template or end tokens; the finding's name, and words of its line."""


def plant(done):
    """Put a mistake in place -> the flags that go with it."""
    flags = []
    for part in [done] if isinstance(done, str | dict) or (done and isinstance(done[0], dict)) else done:
        if isinstance(part, dict):
            make_model(**part)
        elif isinstance(part, list):
            write(part)
        elif part.startswith("--"):
            flags.append(part)
        else:
            make_model(part)
    return flags


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, place, capsys):
    write(rows(), "gsm8k-test.jsonl")
    done, subject, words = MISTAKES[name]
    code, report = run(capsys, *plant(done))
    found = [one for one in report["findings"] if one["status"] != "ok" and one["name"].startswith(subject)]
    assert code > 0 and found, alarms(report)
    assert any(words in f"{one['text']}; {one['cure']}" and (one["cure"] or one["status"] == "fail") for one in found)


CHAT = [{"messages": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows()]
HEALTHY = {
    "the built-in run": ["--model=builtin:tiny", "--dataset=builtin:arithmetic", "--max_prompt_length=128"],
    "GSM8K's form": [],
    "message prompts": [CHAT],
    "a box that is asked for": [BOXED, "--reward=math_answer"],
    "thoughts that are asked for": [THOUGHT, "--reward=answer,think_format"],
    "thinking by the template": [THOUGHT, "--enable_thinking", "--reward=answer,think_format", QWEN3],
    "a thought that the template opens": ["--reward=answer", OPENED],
    "an answer without a format": ["--system_prompt=", "--reward=answer"],
    "an own reward": ["--reward=mine.py:substring"],
    "an own reward beside a grader": ["--reward=correctness,mine.py:short"],
    "an own tag that the prompt asks for": [
        "--system_prompt=Write <solution>NUMBER</solution> at the end.", "--reward=mine.py:tagged", rows(answer=final),
    ],
    "own words that the prompt asks for": [
        "--system_prompt=End with My answer: NUMBER", "--reward=mine.py:labelled", rows(answer=final),
    ],
    "an own column of answers": ["--system_prompt=", "--reward=mine.py:truth", rows(label=lambda a, b: a + b)],
    "prompts alone and a reward of form": ["--reward=mine.py:length", [{"prompt": f"{a} {b}"} for a, b in NUMBERS]],
    "a penalty of long answers": ["--overlong_buffer=100"],
    "letters as answers": ["--reward=correctness", rows(answer=lambda a, b: "ABCD"[a % 4])],
    "yes and no": ["--reward=answer", rows(answer=lambda a, b: ["yes", "no"][a % 2])],
    "formulas with worked solutions": [
        BOXED, "--reward=math_answer",
        rows(answer=lambda a, b: rf"\frac{{{a}}}{{7}}", solution=lambda a, b: rf"So \boxed{{\frac{{{a}}}{{7}}}}"),
    ],
    "a base model without a template": ["--chat_template=none", {"ends": [0]}],
    "scored responses": ["--offline", scored([1.0, 0.0])],
    "preferences": ["--offline", [{"prompt": f"{a}?", "chosen": "Yes.", "rejected": "No."} for a, _ in NUMBERS]],
    "chats": ["--offline", [{"messages": [*chat["messages"], {"role": "assistant", "content": "4"}]} for chat in CHAT]],
    "other rows held out": ["--eval_steps=5", "--eval_dataset=held.jsonl"],
    "adapters": ["--lora_rank=4", "--learning_rate=1e-4"],
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_no_alarm(name, place, capsys):
    write([{"question": f"What is {a} times {b}?", "answer": str(a * b)} for a, b in NUMBERS], "held.jsonl")
    flags = plant(HEALTHY[name]) if HEALTHY[name] else []
    flags += ["--max_completion_length=96"] if "--model=builtin:tiny" in flags else []
    code, report = run(capsys, *flags)
    assert code == 0, alarms(report)
    assert report["ok"] == len(report["findings"]) >= 6


def test_gsm8k_and_its_rewards_raise_no_alarm(shared, place, capsys):
    lines = (shared / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]
    (place / "rows.jsonl").write_text("\n".join(lines))
    shutil.copy(shared / "qwen3_tokenizer" / "tokenizer.json", place / "model")
    change = {"vocab_size": 151_936}
    (place / "model" / "config.json").write_text(json.dumps(json.loads((BUILTIN / "config.json").read_text()) | change))
    (place / "model" / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    rewards = "--reward=correctness,answer,math_answer,integer,strict_format,soft_format,tag_presence,tag_count"
    code, report = run(capsys, "--max_prompt_length=256", "--max_completion_length=768", rewards)
    assert code == 0, alarms(report)
    assert all(scores["right"] > scores["empty"] for scores in report["rewards"].values())


def test_the_scored_file_raises_no_alarm(shared, place, capsys):
    lines = (shared / "scored" / "gsm8k_scored.jsonl").read_text().splitlines()[:200]
    (place / "rows.jsonl").write_text("\n".join(lines))
    code, report = run(capsys, "--offline")
    assert code == 0, alarms(report)


def test_the_page_shows_the_prompt_and_no_key(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setenv("WANDB_API_KEY", "another_secret")
    flags = [f"--{name}={value}" for name, value in DEFAULTS.items()]
    assert check.main(parse_flags([*flags, "--report_to=wandb", "--wandb_mode=offline"], check.SECTIONS)) in (0, 2)
    page = capsys.readouterr().out
    assert "secret" not in page and "HF_TOKEN is set, WANDB_API_KEY is set" in page
    prompt = "".join(line[4:] for line in page.splitlines() if line.startswith("  | "))
    assert "[<|im_start|> 1]" in prompt and prompt.count("[<|im_end|> 2]") == 2
    assert "Ann has 17 pens." in prompt.replace("\u00b7", "")
    assert "</answer>[<|im_end|> 2]" in page


@pytest.mark.parametrize("free, status", [(10**6, "fail"), (10**12, "ok")])
def test_room_for_checkpoints_is_counted(free, status, place, capsys, monkeypatch):
    monkeypatch.setattr(check, "free_bytes", lambda path: free)
    found = {one["name"]: one for one in run(capsys)[1]["findings"]}["disk"]
    assert found["status"] == status and "3 checkpoints" in found["text"]


def test_a_checkpoint_has_three_numbers_for_each_trained_parameter(place):
    built = build(parse_flags(["--model=builtin:tiny"], check.SECTIONS), "auto", TRAIN_DEFAULTS)
    counted = check.parameter_count(built)
    assert counted == 918_912 and abs(check.checkpoint_bytes(built) - 12 * counted) < 100


def test_the_plan_of_a_card_is_on_the_page(place, capsys):
    small = run(capsys, "--topology=gpu:80GB")[1]
    assert small["plan"]["fits"] and any(one["name"] == "plan" for one in small["findings"])
    code, unknown = run(capsys, "--topology=abacus:1")
    assert code == 2 and unknown["findings"][-1]["status"] == "fail"


def test_train_tells_mistakes_in_a_moment_and_goes_on(place, capsys):
    flags = [f"--{name}={value}" for name, value in DEFAULTS.items()]
    settings = parse_flags([*flags, "--reward=answer,think_format", "--temperature=0.01"], train.SECTIONS)
    built = build(settings, "auto", TRAIN_DEFAULTS)
    data, rewards = train.load_prompts(built)
    capsys.readouterr()
    started = time.process_time()
    train.tell_mistakes(built, data, rewards)
    assert time.process_time() - started < 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].split() for line in lines] == [["warn", "format"], ["warn", "sampling"]]


def test_train_is_silent_about_a_healthy_run_and_does_not_wait_for_slow_rewards(place, capsys, monkeypatch):
    monkeypatch.setattr(train, "CHECK_SECONDS", 0.2)
    source = "\ndef slow(completions, **_):\n    __import__('time').sleep(5)\n    return [0.0] * len(completions)\n"
    (place / "slow.py").write_text(source)
    for reward, count in (("correctness", 0), ("correctness,slow.py:slow", 1)):
        flags = [f"--{name}={value}" for name, value in DEFAULTS.items()]
        built = build(parse_flags([*flags, f"--reward={reward}"], train.SECTIONS), "auto", TRAIN_DEFAULTS)
        loaded = train.load_prompts(built)
        capsys.readouterr()
        train.tell_mistakes(built, *loaded)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == count and all("python -m minigrpo.check takes the time" in line for line in lines)


# Made-up answers


@pytest.mark.parametrize("name, wanted", [("tagged", "<solution>"), ("labelled", "My answer:")])
def test_a_format_is_read_off_an_own_reward(name, wanted, place):
    from minigrpo.data.rewards import parse_rewards

    (reward,) = parse_rewards(f"mine.py:{name}")
    forms = probes.formats_of(reward.function)
    assert any(wanted in form.text for form in forms)
    problem = probes.Problem("I think.", "42", "42", "91")
    scores = [reward.function([form.write(problem)], ["42"])[0] for form in forms]
    assert max(scores) == 1.0
    assert max(reward.function([form.write(problem, right=False)], ["42"])[0] for form in forms) == 0.0


@pytest.mark.parametrize("answer", ["72", "0", "1", "-3", "2.5", "$18", "1,000", "3/4", "yes", r"\sqrt{2}", "x", "13"])
def test_a_wrong_answer_is_wrong_and_holds_no_right_one(answer):
    from minigrpo.data.grading import same_answer

    wrong = probes.wrong_answer(answer, ["no", answer])
    assert not same_answer(f"#### {wrong}", answer) and answer not in wrong and wrong not in answer


def test_the_reasoning_of_a_reference_has_no_mark_of_the_answer():
    assert probes.reasoning_of({}, "We add 3 and 4.\n#### 7", "7") == "We add 3 and 4."
    assert probes.reasoning_of({}, "7", "7") == probes.STOCK
    row = {"solution": r"So x is \boxed{\frac{1}{2}}, as was asked."}
    assert probes.reasoning_of(row, r"\frac{1}{2}", r"\frac{1}{2}") == r"So x is \frac{1}{2}, as was asked."


def test_a_small_rollout_estimates_steps_hours_and_price(place, capsys):
    flags = ["--model=builtin:tiny", "--dataset=builtin:arithmetic", "--max_prompt_length=64"]
    flags += ["--max_completion_length=16", "--batch_size=4", "--num_generations=4", "--max_steps=50"]
    code, report = run(capsys, *flags, "--rollout", "--price_per_hour=3")
    found, figures = {one["name"]: one["status"] for one in report["findings"]}, report["rollout"]
    assert code == 2 and found["lengths"] == "fail" and found["completions"] == "fail"
    assert figures["clipped_ratio"] > 0.9 and 0 <= figures["frac_reward_zero_std"] <= 1 and figures["steps"] == 50
    assert figures["hours"] == pytest.approx(50 * figures["seconds_per_step"] / 3600)
    assert figures["price"] == pytest.approx(3 * figures["hours"])

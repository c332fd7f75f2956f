"""Sharing a trained model: its card, README.md, and the upload to the Hub."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from minigrpo.config import HUB_REPOSITORY, RunOptions, Settings, UsageError, read_json
from minigrpo.data.files import GSM8K, is_file
from minigrpo.reporting.significance import interval
from minigrpo.runtime.files import write_whole, writing
from minigrpo.runtime.run_folder import read_steps
from minigrpo.version import __version__

TEMPLATE = Path(__file__).parent / "builtin" / "card.md.jinja"

PICTURES = {"progress": "Held-out accuracy by step", "reward": "Reward by step"}
"""Pictures of the report that the card shows -> their captions."""

PRIVATE = ("run", "cluster")
"""Sections whose flags say where and how a run was kept, not how the model was trained."""

STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
"""Weights that an upload replaces: left beside the new ones they would be read with them."""


# The card


def write_card(folder: Path, settings: Settings, base: str) -> Path:
    """Write FINAL/README.md, the model card of a finished run with its report, and the pictures it shows -> its path.

    `base` is the Hub id or path of the model that was trained.
    """
    final = folder / "final"
    shown = {f"{name}.png": caption for name, caption in PICTURES.items() if (folder / f"report/{name}.png").exists()}
    with writing(final):
        for file in shown:
            shutil.copyfile(folder / "report" / file, final / file)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_fields(folder, settings, base), pictures=shown
    )
    write_whole(final / "README.md", text)
    return final / "README.md"


def card_fields(folder: Path, settings: Settings, base: str) -> dict[str, Any]:
    """Return what the card's template shows of a run."""
    summary, data, name = read_json(folder / "summary.json"), settings.data, settings.run.push_to_hub
    base_id = "" if Path(base).is_dir() else hub_id(base)
    data_id = "" if is_file(data.dataset) or Path(data.dataset).is_dir() else hub_id(data.dataset)
    hours = summary["hours"]
    return {
        "front_matter": front_matter(base_id, data_id),
        "title": name.rpartition("/")[2] or folder.absolute().name,
        "base": link(base_id, "") or f"`{plain(base)}`",
        "local_base": not base_id,
        "version": __version__,
        "summary": summary,
        "offline": data.offline,
        "results": results(folder, settings, summary),
        "name": name or "path/to/final",
        "prompt": example_prompt(folder / "final", data.system_prompt),
        "tokens": settings.rollout.max_completion_length,
        "rank": read_json(folder / "adapter" / "adapter_config.json").get("r"),
        "dataset": link(data_id, "datasets/") or f"`{plain(data.dataset)}`",
        "duration": f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes",
        "rewards": "the file's scores" if data.offline else f"`{plain(settings.rewards.reward)}`",
        "flags": changed_flags(settings),
    }


def link(name: str, kind: str) -> str:
    """Return a link to a Hub repository, "" for none; `kind` is "" for models or "datasets/"."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if name else ""


def front_matter(base_id: str, data_id: str) -> str:
    """Return the card's YAML, which the Hub reads."""
    card = huggingface_hub.ModelCardData(
        base_model=base_id or None,
        datasets=[data_id] if data_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "minigrpo"],
    )
    return str(card.to_yaml())


def hub_id(name: str) -> str:
    """Return the Hub id that a flag names, "" where its value has not the form of one.

    >>> hub_id("gsm8k"), hub_id("Qwen/Qwen3-1.7B"), hub_id("/data/mine"), hub_id("builtin:tiny")
    ('openai/gsm8k', 'Qwen/Qwen3-1.7B', '', '')
    """
    full = GSM8K if name == "gsm8k" else name
    return full if HUB_REPOSITORY.fullmatch(full) else ""


def plain(value: str) -> str:
    """Return a flag's value without the folders of the author's machine.

    >>> plain("/home/me/mine.py:brevity*0.5,answer"), plain("Qwen/Qwen3-1.7B")
    ('mine.py:brevity*0.5,answer', 'Qwen/Qwen3-1.7B')
    """
    return re.sub(r"(?:^|(?<=,))(?:~|\.{1,2})?/[^,]*/", "", value)


def changed_flags(settings: Settings) -> list[str]:
    """Return the flags of training that differ from their defaults, one line each."""
    sections = [getattr(settings, name) for name in settings.sections if name not in PRIVATE]
    fields = [(field, getattr(options, field.name)) for options in sections for field in dataclasses.fields(options)]
    changed = [(field.name, value) for field, value in fields if value != field.default]
    return [f"--{name}={one_line(value)}" for name, value in changed]


def one_line(value: Any) -> str:
    """Return a flag's value as it is written on a command line."""
    return plain(value).replace("\n", "\\n") if isinstance(value, str) else str(value)


def results(folder: Path, settings: Settings, summary: dict[str, Any]) -> list[str]:
    """Return what the run reached, one sentence each: held-out accuracy with its interval, or margin, and reward."""
    rows = read_steps(folder / "evaluations.jsonl")
    name = "margin" if settings.data.offline else "accuracy"
    measured = [row for row in rows if name in row]
    ends = [measured[0], measured[-1]] if len(measured) > 1 else measured
    data = plain(settings.run.eval_dataset if settings.run.eval_dataset != "auto" else settings.data.dataset)
    if settings.data.offline:
        told = "; ".join(f"{row['margin']:.4f} after {row['step']} steps" for row in ends) or "not measured"
        return [f"Margin of better over worse responses on held-out prompts, in nats per token: {told}."]
    reward = summary["reward"]
    lines = [f"Mean reward: {reward['first']:.3f} in the first tenth of the steps, {reward['last']:.3f} in the last."]
    if not ends:
        return [*lines, "Accuracy on held-out problems was not measured during the run."]
    told = "; ".join(f"{accuracy(row)} after {row['step']} steps" for row in ends)
    count = settings.run.eval_num_generations
    kind = "Greedy accuracy" if count == 1 else f"Accuracy, the mean of {count} samples,"
    return [f"{kind} on {int(ends[-1]['problems'])} held-out problems of {data}: {told}.", *lines]


def accuracy(row: dict[str, Any]) -> str:
    """Return an evaluation's accuracy with its interval."""
    low, high = interval(row["accuracy"], int(row["problems"]))
    return f"{row['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"


def example_prompt(final: Path, system: str) -> str:
    """Return the Python text of a prompt: messages where the model has a chat template, with its system message."""
    tokenizer = read_json(final / "tokenizer_config.json")
    question = "What is 12 times 7?"
    if not (final / "chat_template.jinja").exists() and not tokenizer.get("chat_template"):
        return json.dumps(question)
    first = [{"role": "system", "content": system}] if system not in ("auto", "") else []
    return json.dumps([*first, {"role": "user", "content": question}], ensure_ascii=False)


# The Hub


def upload_commands(folder: Path, name: str) -> str:
    """Return the commands that upload a run's model by hand."""
    commands = [f"hf upload {name} {shlex.quote(str(folder / 'final'))} ."]
    if (folder / "adapter").is_dir():
        commands.append(f"hf upload {name} {shlex.quote(str(folder / 'adapter'))} adapter")
    return " && ".join(commands)


def check_hub(options: RunOptions) -> None:
    """Create the repository of --push_to_hub, if set; UsageError where the upload at the end could not succeed."""
    name = options.push_to_hub
    if not name:
        return
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push_to_hub={name}: HF_HUB_OFFLINE is set; unset it, or upload RUN/final by hand later")
    if huggingface_hub.get_token() is None:
        raise UsageError(f"--push_to_hub={name}: there is no token; set HF_TOKEN, or run `hf auth login`")
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        api.create_repo(name, private=options.hub_private or None, exist_ok=True)
        api.auth_check(name, write=True)
        public = options.hub_private and not api.model_info(name).private
    except Exception as error:  # httpx's, the Hub's, or the system's
        raise UsageError(f"--push_to_hub={name}: {refusal(error)}") from error
    if public:
        raise UsageError(f"--hub_private: {name} exists and is public; make it private there, or name another one")


def refusal(error: Exception) -> str:
    """Return why the Hub refused, and the cure, in one line."""
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub gave no answer ({type(error).__name__}: {first_line(error)})"
    status = error.response.status_code
    cures = {401: "the token is not valid; set HF_TOKEN anew", 403: "the token may not write there; set one that may"}
    return f"{cures.get(status, f'the Hub answered {status}')} ({error.server_message or first_line(error)})"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def push(folder: Path, name: str) -> str:
    """Upload a run's final/, and its adapter/, to the Hub -> the address.

    UsageError with the command that does it by hand; the run folder is whole all the same.
    """
    api = huggingface_hub.HfApi()
    message = f"Trained by minigrpo {__version__}"
    try:
        api.upload_folder(repo_id=name, folder_path=folder / "final", commit_message=message, delete_patterns=STALE)
        if (folder / "adapter").is_dir():
            api.upload_folder(
                repo_id=name, folder_path=folder / "adapter", path_in_repo="adapter", commit_message=message
            )
    except Exception as error:  # httpx's, the Hub's, or the system's
        raise UsageError(
            f"--push_to_hub={name}: the upload failed: {refusal(error)}; the model is whole in {folder / 'final'}: "
            f"{upload_commands(folder, name)}"
        ) from error
    return f"{api.endpoint}/{name}"

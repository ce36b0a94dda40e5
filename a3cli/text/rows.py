"""Turn a row of a data set into text: one of its fields, or its messages rendered by the chat template."""

from typing import Any

from a3cli.errors import A3Error, first_line, kind_of
from a3cli.settings import TextSettings
from a3cli.work.files import Json

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # roles of ShareGPT's `from`
CHATS = ("messages", "conversations")


def text_field(settings: TextSettings) -> str:
    return settings.text_field or "text"


def chat_field(row: Json, settings: TextSettings) -> str | None:
    """Return the field with a row's messages if they stand in for its text: it has no `text`, and none was named."""
    if text_field(settings) != "text" or "text" in row:
        return None
    return next((name for name in CHATS if name in row and isinstance(row[name], list | None)), None)


def text_of(row: Json, settings: TextSettings, where: str) -> str:
    """Return a row's text, empty for null. Raises A3Error if there is no such field or it holds something else."""
    field = text_field(settings)
    if field not in row:
        chats = [name for name in CHATS if name in row]
        reader = f"--chat reads its {chats[0]!r}" if chats else "choose one with --text-field"
        raise A3Error(
            f"dataset {settings.dataset} has no field {field!r}; its fields are {', '.join(sorted(row))} ({reader})"
        )
    value = row[field]
    if value is None or isinstance(value, str):
        return value or ""
    reader = "--chat reads messages" if isinstance(value, list) else "--text-field chooses another"
    raise A3Error(f"{where}: field {field!r} holds {kind_of(value)}, not text ({reader})")


def chat_of(row: Json, tokenizer: Any, settings: TextSettings, where: str) -> str:
    """Return a row's messages rendered by the chat template, empty if it has none."""
    fields = [settings.text_field] if settings.text_field else list(CHATS)
    found = [field for field in fields if field in row]
    if not found:
        raise A3Error(
            f"dataset {settings.dataset} has no field {' or '.join(map(repr, fields))} for --chat; its fields are "
            f"{', '.join(sorted(row))} (leave out --chat, or name the field of the messages with --text-field)"
        )
    messages = next((row[field] for field in found if row[field]), None)
    return render_chat(tokenizer, as_messages(messages, where), where) if messages else ""


def as_messages(turns: Any, where: str) -> list[Json]:
    """Return turns with `role` and `content`; those of ShareGPT have `from` and `value`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise A3Error(f"{where}: the messages are not a list of turns with role and content, or from and value")
    return [as_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def as_message(turn: Json, where: str) -> Json:
    if turn.get("role") is not None:
        return turn
    if "from" not in turn or not isinstance(turn.get("value"), str):
        raise A3Error(f"{where}: has neither role and content, nor from and value with text")
    speaker = str(turn["from"])
    if speaker not in SPEAKERS:
        raise A3Error(f"{where}: unknown speaker {speaker!r}; --chat knows {', '.join(SPEAKERS)}")
    return {"role": SPEAKERS[speaker], "content": turn["value"]}


def render_chat(tokenizer: Any, messages: list[Json], where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs
        if getattr(tokenizer, "chat_template", None) is None:
            raise A3Error(
                f"{where}: the model's tokenizer has no chat template for its messages; add a chat_template.jinja to "
                "the model's folder, or name a field with text (--text-field, without --chat)"
            ) from error
        raise A3Error(f"{where}: the chat template failed: {first_line(error)}") from error

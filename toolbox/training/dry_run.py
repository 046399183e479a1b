"""``--dry-run`` of a trainer: everything but the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolbox.models.load import ModelSource
from toolbox.shell.command import Invocation
from toolbox.shell.streams import JsonlWriter
from toolbox.training.language import Adapting
from toolbox.training.prepare import encode_rows

if TYPE_CHECKING:
    from toolbox.training.language import Brief, Task

_BYTES = {"adamw": 16, "sgd": 8}
"""fp32 weights and gradients, and AdamW's two moments, in bytes a trained parameter."""


def show_plan(task: Task, call: Invocation, source: ModelSource, brief: Brief) -> None:
    """Print counts, steps, parameters and a memory estimate: JSON on stdout, for people on stderr.

    The first row to be learned or kept is shown as the model sees it, its labelled tokens marked.
    """
    from toolbox.models.chat import Chat
    from toolbox.models.facts import count_parameters
    from toolbox.models.load import load_config, load_tokenizer, prepare

    options = task.options
    prepare(source, call.reporter.note)
    parameters = count_parameters(source, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    chat = Chat(tokenizer, options.template, options.system)
    encoded = {
        name: encode_rows(chat, rows, name, options, call.reporter.warn)[0] for name, rows in brief.train.items()
    }
    counts = {name: len(rows) for name, rows in encoded.items()}
    plan = task.plan(counts)
    lr = task.auto_lr(parameters) if options.lr == "auto" else float(options.lr)
    whole = not options.lora_r and options.train_params is None and not isinstance(task, Adapting)
    trained = _BYTES[options.optimizer] if whole else 4
    event: dict[str, Any] = {
        "event": "plan",
        "command": call.command,
        "settings": call.settings,
        "rows": counts,
        "watched": {name: len(rows) for name, rows in brief.watched.items()},
        "tokens": {name: sum(len(row.ids) for row in rows) for name, rows in encoded.items()},
        "labelled": {name: sum(row.n_labelled for row in rows) for name, rows in encoded.items()},
        "steps": plan.steps,
        "parameters": parameters,
        "lr": lr,
        "template": chat.name,
        "memory_bytes": parameters * trained,
    }
    if isinstance(task, Adapting):
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        event["parts"] = task.trainable(config)
        event["trainable"] = sum(event["parts"].values())
    writer = JsonlWriter(call.streams)
    writer.write(event)
    writer.close()
    call.reporter.note(
        f"{parameters / 1e6:.1f} M parameters, {plan.steps} steps of {options.batch_size} rows at lr {lr:g}; at least "
        f"{parameters * trained / 2**30:.1f} GiB for weights, gradients and optimiser"
    )
    for name in ("train", "retain"):  # the words of other sets may be those to forget
        if name in encoded:
            call.reporter.note(f"first {name} row, labelled tokens in ⟦ ⟧:")
            call.reporter.show(chat.show(encoded[name][0]))

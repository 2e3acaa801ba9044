"""Continue a text with a trained language model; the text streams to the screen as it comes.

permoe generate --workdir=DIR --prompt=TEXT [--max_tokens=N] [--temperature=T] [--top_p=P]
                [--seed=S] [--num_samples=K] [--prompts=FILE] [--json=FILE] [--step=N]

The text is a function of the checkpoint, the prompt, the sampling flags and the seed. It goes to
the standard output; speed and warnings go to the standard error, so that the text can be piped. A
sample ends where the model ends the document, after --max_tokens, or where prompt and text fill
the context, config.data.seq_len of the run.

The model is the one that was trained, by the run's own saved config. Overrides may change where it
runs (mesh.*, data.data_dir), model.dtype, model.attention, and data.name, to another text of the
same tokenizer. A run whose config file registers a router of its own needs --config=FILE too.
"""

import argparse
import os
import sys

from moe import cli


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the directory of a run of text")
    parser.add_argument("--prompt", help="how the text begins; default: nothing")
    parser.add_argument("--prompts", help="a file of one prompt a line; .jsonl: JSON strings")
    parser.add_argument("--max_tokens", type=int, default=200, help="for a sample; default 200")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0: the most probable token; default 1"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from so much of the probability; default 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    parser.add_argument("--num_samples", type=int, default=1, help="of each prompt; default 1")
    parser.add_argument("--batch_size", type=int, default=8, help="samples at a time; default 8")
    parser.add_argument("--json", help="a file for prompts, texts and tokens")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--config", help="a config file, for the routers that it registers")
    flags, overrides = cli.parse(parser, argv)
    workdir = cli.local_path(flags.workdir)
    file = None if flags.json is None else cli.local_path(flags.json, "--json")
    if flags.config is not None:
        cli.read_config(flags.config)
    from moe.evaluate import generation  # late: a misspelt flag should not wait for JAX

    generation.check_flags(vars(flags))
    try:
        generation.generate_run(
            workdir,
            generation.read_flags(flags.prompt, flags.prompts),
            sampling=generation.Sampling(flags.temperature, flags.top_p, flags.seed),
            max_tokens=flags.max_tokens,
            num_samples=flags.num_samples,
            batch_size=flags.batch_size,
            step=flags.step,
            overrides=overrides,
            json_file=file,
        )
    except BrokenPipeError:  # whoever read has enough; Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Some six hundred commands that no program can carry out, over the four programs.

Each ends with exit code 2 and a line for each thing that is wrong, before anything is compiled,
and leaves every file as it was. The bad numbers come from the table of the keys, so that a new
key joins by itself.
"""

import pathlib
import shutil

import pytest

from moe.config import keys
from tests.moe.forks import ROOT, Forks
from tests.moe.test_ranges import MINUS_ONE, NUMBERS, ZERO

pytestmark = pytest.mark.slow
SECONDS = 10
HUGE = ("nan", "inf", "1e99", str(10**30))
TEXTS = [name for name, key in keys().items() if isinstance(key.within, tuple)]
LONG = "a" * 300

# Of each program: a flag and the values that it cannot have; under "" whole arguments. They come
# after those of BASE.
TRAIN = {
    "--num_processes": "2|x",
    "--config": (
        "|nowhere.py|.|{cwd}|{files}/text.txt|{files}/empty.py|{files}/none.py|gs://a/b.py|"
        "~no_such_user/x.py"
    ),
    "--workdir": (
        "|{space}|gs://bucket/run|s3://b|gs:x|{long}|~no_such_user/run|{files}/text.txt|"
        "{files}/text.txt/run|/dev/null|/dev/null/run|/proc/run|{run}"
    ),
    "--config.moe.layers": (
        "last|last-|last-0|last--1|last-9|every-0|every-9|1,1|9|-1|1;3|1,|all|1.5"
    ),
    "--config.depth.layers": "last|every-9|1,1|9|all|1",
    "--config.depth.router": "|threshhold",
    "--config.data.name": "|nowhere|../x|gs://x|digits/other|digits:9.9.9|a b",
    "--config.data.train_split": "|valid|train[|train[:0%]|train[99999:]",
    "--config.data.eval_split": "|valid|test[5:2]",
    "--config.data.num_classes": "7|11",
    "--config.data.data_dir": "gs://bucket|{files}/text.txt|~no_such_user|{long}",
    "--config.data.augment.resized_crop": (
        "x|(|(1,2,3)|(0.9,0.1)|[0.5]|{{1:2}}|{{[]:1}}|('a','b')|(1e-1,1e99)|(-1,1)|(0.5,True)|"
    ),
    "--config.data.augment.flip": "maybe|2|",
    "--config.batch_size": "many|2.5|1e3||0x10|12|7",
    "--config.seed": "1.0|--|{digits}",
    "--config.optimizer.b1": "x||0,9",
    "--config.moe.dense": "maybe||1",
    "--config.model.num_heads": "3|128",
    "--config.model.patch_size": "3|16",
    "--config.moe.group_size": "3|128",
    "--config.optimizer.accumulate": "3|16",
    "--config.mesh.data": "3|16|1",
    "--config.init.workdir": (
        "nowhere|{files}/text.txt|{cwd}|gs://b/run|~no_such_user/run|{run}|{long}"
    ),
    "": (
        "extra|--config.seed|--config.model.width=6 --config.model.num_heads=1|"
        "--config.moe.dense=true --config.moe.num_experts=1|"
        "--config.router.name=topk --config.router.topk.k=9|"
        "--config.num_steps=20 --config.optimizer.warmup_steps=20|"
        "--config.mesh.data=-2 --config.mesh.fsdp=-2|"
        "--config.mesh.expert=8 --config.moe.num_experts=4|"
        "--config.mesh.data=2 --config.mesh.fsdp=2|"
        "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.optimizer.compress.keep=0.1|"
        "{tiny} --config.init.workdir={run} --config.init.step=999|"
        "{tiny} --workdir={run} --config.seed=1|"
        "{tiny} --workdir={run} --config.num_steps=12|"
        "{tiny} --workdir={run} --config.loss=sigmoid|"
        "{tiny} --workdir={run} --config.router.name=soft_moe|"
        "{tiny} --workdir={run} --config.model.scan=true|"
        "{tiny} --workdir={run} --config.optimizer.b2=0.9|"
        "{tiny} --workdir={run} --config.moe.num_experts=8|"
        "{tiny} --workdir={run} --config.router.topk.noise=0.5|--confg.seed=1|--seed=1|"
        "--config.=1|--config..seed=1|--config.model=1|--config.data.augment=1|"
        "--config.sed=1|--config.router.topk=1|--config.router.own.k=1|--process_id=0|"
        "--coordinator=here|--start_timeout=x|--config.data.channels=3|"
        "--config.data.augment.crop=9|--config.data.augment.cutout=9|"
        "--config.model.scan=no|--config.model.width=63|--config.data.image_size=7|"
        "--config.moe.num_experts=1|--config.router.sparse_expert_choice.k=9|"
        "--config.eval.batch_size=12|--config.optimizer.warmup_steps=1200|"
        "--config.mesh.fsdp=-1|--config.mesh.expert=3|--config.mesh.tensor=3"
    ),
}
EVAL = {
    "--step": "-1|999|x|1e9|nan||99999999999999999999",
    "--split": "|valid|train[|test[:0%]|test[5:2]",
    "--config": "nowhere.py||{files}/none.py",
    "--workdir": (
        "|nowhere|{cwd}|{files}/text.txt|gs://b/run|{run}/checkpoints|{long}|"
        "~no_such_user/x|/dev/null"
    ),
    "--config.router.name": "soft_moe|topp",
    "--config.eval.batch_size": "7|0",
    "--config.mesh.data": "3|0",
    "--config.moe.eval_capacity_factor": "0|inf",
    "": (
        "extra|--steps=3|--config.moe=1|--config.moe.eval_capacity=4|"
        "--config.router.topk.k=1|--config.model.width=32|--config.model.depth=4|"
        "--config.model.num_heads=4|--config.seed=1|--config.moe.num_experts=2|"
        "--config.moe.layers=none|--config.moe.dense=true|--config.model.pool=mean|"
        "--config.model.position=sincos|--config.model.patch_size=2|"
        "--config.moe.expert_dim=8|--config.data.name=nowhere|"
        "--config.data.data_dir=gs://b|--config.mesh.expert=3|--config.moe.dispatch=x|"
        "--config.loss=hinge|--config.model.dtype=float16"
    ),
}
GENERATE = {
    "--step": "-1|999|x||99999999999999999999",
    "--prompt": "\udcff|\ud83d|" + "a" * 32,
    "--prompts": "|nowhere|{cwd}|gs://b/x|{long}|/dev/null|{files}/empty.py|{files}/broken.jsonl",
    "--temperature": "-1|nan|inf|1e-9|1e9|x|",
    "--top_p": "0|-1|1.01|nan|x|",
    "--max_tokens": "0|-1|1.5|x|1e3|99999999999999999999|",
    "--num_samples": "0|-1|x|99999999999999999999",
    "--batch_size": "0|-1|x|99999999999999999999",
    "--seed": "-1|x|9223372036854775808|{digits}",
    "--json": "|{cwd}|gs://b/x|/dev/full|{long}|~no_such_user/x|{files}/text.txt/x",
    "--config": "nowhere.py|{files}/none.py",
    "--workdir": "|nowhere|{cwd}|{run}|{files}/text.txt|gs://b/run|{text}/checkpoints|{long}",
    "": (
        "extra|--prompt=a --prompts=b|--promp|--config.model.width=32|--config.seed=1|"
        "--config.data.name=nowhere|--config.data.seq_len=8|--config.mesh.expert=3|"
        "--config.router.name=soft_moe|--config.eval.batch_size=0|--config.model.dtype=float16"
    ),
}
COMPARE = {
    "--routers": (
        "|topk,topk|x|topk,|dense,dense|,|all,topk|topk:|topk:k|topk:k=0|topk:x=1|topk:seed=1"
    ),
    "--seeds": "0|-1|x|1.5|1000000000||99999999999999999999|2-1",
    "--baseline": "x|dense|all",
    "--jobs": "0|-1|x|",
    "--tune": "|x|x:1,2|learning_rate:1|learning_rate:1,-1|k:1,2",
    "--merge": "|nowhere|{cwd}",
    "--config": "nowhere.py|{files}/none.py",
    "--out": (
        "|gs://x/y|{files}/text.txt|{files}/text.txt/x|{long}|~no_such_user/x|/dev/null|/proc/x"
    ),
    "": (
        "extra|--router=topk,x|--config.seed=1|--config.router.name=topk|"
        "--config.moe.dense=true|--config.sed=1|--config.data.name=nowhere|"
        "--config.data.eval_split=valid|--config.model.num_heads=3|"
        "--config.moe.num_experts=1|--config.moe.layers=1,1|--config.batch_size=7|"
        "--config.mesh.data=3|--config.init.workdir=nowhere|--config.loss=hinge|"
        "--config.moe.dispatch=x"
    ),
}
PLAN = {
    "--topology": (
        "|cpu|cpu:|cpu:0|cpu:-1|cpu:x|cpu:1000000|cpu:1.5|cpu:8x8x8|2xcpu:4|x:1|h100:0x8|"
        "h100:99999999|h100:4x8x2|2xh100:4x8|99999xv5e:16x16|v5p:4x4|v5e:4x4x4|v5e:999x999|"
        "v5e:0x4|0xv5e:4x4|v9:1|CPU:8|cpu:\uff18|cpu:99999999999999999999|gs://x"
    ),
    "--json": (
        "|{cwd}|{cwd}/none/x.json|gs://b/x|/dev/full|/proc/x|{long}|~no_such_user/x|"
        "{files}/text.txt/x"
    ),
    "--sweep": "0|-1|x",
    "--config": "nowhere.py|{files}/none.py",
    "": (
        "--sweep|extra|--config.sed=1|--config.mesh.data=3|--config.mesh.expert=3|"
        "--config.model.num_heads=3|--config.batch_size=0|--config.moe.layers=1,1|"
        "--config.moe.num_experts=1|--config.model.remat=all|--config.model.patch_size=3|"
        "--config.data.name=nowhere|--config.data.channels=3|"
        "--config.data.train_split=valid|--config.moe.dispatch=x|--config.loss=hinge|"
        "--config.data.augment.crop=9|--config.optimizer.accumulate=3"
    ),
}
BASE = {
    "train": "--config={config} --workdir={cwd}/new --config.data.data_dir={data}",
    "eval": "--workdir={run}",
    "generate": "--workdir={text}",
    "compare": "--config={config} --routers=topk --seeds=1 --out={cwd}/new "
    "--config.data.data_dir={data}",
    "plan": "--config={config} --topology=cpu:1 --config.data.data_dir={data}",
}


def bad_numbers() -> list[str]:
    """Returns an override for each number of a config and each value outside its range."""
    cases = []
    for name in NUMBERS:
        low = ["-1"] * (name not in MINUS_ONE) + ["0"] * (name not in ZERO)
        cases += [f"--config.{name}={value}" for value in (*low, *HUGE)]
    return cases


def bad_names() -> list[str]:
    """Returns overrides for each key that is one of some names."""
    values = ("", "nothing", "TOPK", "cosin", "float64")
    return [f"--config.{name}={value}" for name in TEXTS for value in values]


def cases(places: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Returns every command: a program and its arguments."""
    tables = {"train": TRAIN, "eval": EVAL, "generate": GENERATE, "compare": COMPARE, "plan": PLAN}
    numbers, commands = bad_numbers(), []
    for program, table in tables.items():
        bad = [
            (f"{flag}={value}" if flag else value).format(**places)
            for flag, values in table.items()
            for value in values.split("|")
        ]
        bad += numbers + bad_names() if program == "train" else numbers[len(program) :: 9]
        base = BASE[program].format(**places).split(" ")
        commands += [(program, [*base, *_split(case)]) for case in bad]
    for program in tables:
        commands.append((program, []))
    return commands


def _split(case: str) -> list[str]:
    """Splits at the spaces before a flag: a value may have spaces of its own."""
    first, *rest = case.split(" --")
    return [first, *(f"--{part}" for part in rest)]


def state(directory: pathlib.Path) -> dict[str, tuple]:
    """Returns what is in a directory: every path with its size and the time of its last change."""
    paths = [directory, *directory.rglob("*")]
    stats = {str(path): path.lstat() for path in paths}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def sandbox(finished_run, finished_text_run, data_dir, tmp_path) -> dict[str, str]:
    """Makes a home, a directory to be in, a run, and files that are of no use."""
    root = tmp_path / "sandbox"
    for name in ("cwd", "home", "files"):
        (root / name).mkdir(parents=True)
    shutil.copytree(data_dir, root / "data")
    shutil.copytree(finished_run, root / "run")
    shutil.copytree(finished_text_run, root / "text")
    for name, text in {
        "text.txt": "text",
        "empty.py": "",
        "none.py": "def get_config(): pass",
        "broken.jsonl": '"a"\n{"prompt": 1}\n',
    }.items():
        (root / "files" / name).write_text(text)
    from tests.moe.conftest import TINY

    places = {name: str(root / name) for name in ("cwd", "home", "files", "run", "text", "data")}
    tiny = " ".join(f"--config.{key}={value}" for key, value in TINY.items())
    config = root / "files" / "tiny.py"
    config.write_text("from moe.config import default\n\ndef get_config():\n    return default()\n")
    places["tiny"] = f"--config={config} {tiny}"
    return places | {
        "config": f"{ROOT}/configs/digits.py",
        "long": LONG,
        "digits": "9" * 5000,
        "space": " ",
    }


def test_every_bad_command_ends_with_one_line_and_touches_nothing(sandbox, tmp_path):
    root = pathlib.Path(sandbox["cwd"]).parent
    commands, wrong = cases(sandbox), []
    assert len(commands) > 500
    forks = Forks(root / "cwd", tmp_path, HOME=sandbox["home"], MPLCONFIGDIR=str(tmp_path))
    before = state(root)
    for program, arguments in commands:
        ended = forks.run(program, arguments)
        after = state(root)
        changed = sorted(path for path in before | after if before.get(path) != after.get(path))
        lines = ended.error.splitlines()  # one for each thing that is wrong
        clear = 0 < len(lines) < 4 and all(line.startswith("error: ") for line in lines)
        if ended.code != 2 or not clear or changed or ended.seconds > SECONDS:
            wrong.append(f"{program} {' '.join(arguments)[-200:]}: {ended} {changed}")
        before = after
    good = forks.run("eval", [f"--workdir={sandbox['run']}"])
    forks.close()
    assert not wrong, f"{len(wrong)} of {len(commands)}:\n" + "\n".join(wrong)
    assert (good.code, good.error) == (0, "")

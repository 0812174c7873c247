"""The snippets of docs/coming_from.md run: dtrp's always, a library's where it is installed, on ranks as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtrp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", text, re.S)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
}
# What the snippets have; a library is imported where its own snippet runs.
SETTING = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
import dtrp

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
dataset = TensorDataset(torch.randn(128, 20), torch.randint(2, (128,)))
loader = DataLoader(dataset, batch_size=32)
"""
HUGGING_FACE = """
from transformers import GPT2Config, GPT2LMHeadModel
config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                    tie_word_embeddings=False)
gpt = GPT2LMHeadModel(config)
ids = torch.randint(11, (4, 8))
texts = [{"input_ids": row, "labels": row} for row in torch.randint(11, (8, 8))]
"""
# Of each section: what is imported, the module that must be there, and the number of ranks of its two snippets.
LIBRARIES = {
    "Plain PyTorch": ("", "torch", 1, 1),
    "DistributedDataParallel": ("", "torch", 2, 4),
    "Hugging Face `Trainer`": (f"{HUGGING_FACE}\nfrom transformers import Trainer, TrainingArguments", "accelerate", 1, 1),
    "Lightning": ("import lightning", "lightning", 1, 1),
    "Accelerate": ("from accelerate import Accelerator", "accelerate", 1, 1),
    "Pipelining in torch": (
        "from torch.distributed.pipelining import PipelineStage, Schedule1F1B", "torch.distributed.pipelining", 1, 1,
    ),
    # Its operation for shared memory is compiled where it is first used; one rank has nobody to share with.
    "DeepSpeed": (
        "import deepspeed\nfrom deepspeed.pipe import PipelineModule\n"
        "sys.modules['deepspeed.comm.torch'].build_shm_op = lambda: None", "deepspeed", 1, 1,
    ),
}  # fmt: skip
IN_ONE_PROCESS = ("Plain PyTorch", "Lightning", "Accelerate", "DeepSpeed")


def start(program: str, num_ranks: int, folder: Path) -> None:
    (folder / "program.py").write_text(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, *ranks, "program.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_row_has_a_section_and_every_section_two_snippets() -> None:
    assert list(SECTIONS) == list(LIBRARIES)
    assert {len(snippets) for snippets in SECTIONS.values()} == {2}
    rows = re.findall(r"^\| \[`?(.*?)`?\]\(#(.*?)\)", PAGE, re.M)
    assert len(rows) == len(SECTIONS)


@pytest.mark.parametrize("title", IN_ONE_PROCESS)
def test_the_snippets_of_dtrp_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(SETTING + SECTIONS[title][1], namespace)
    pipe, loss = namespace["pipe"], namespace.get("loss")
    assert isinstance(pipe, dtrp.Pipeline)
    assert pipe.num_updates == 4
    assert loss is None or isinstance(loss, torch.Tensor)


def test_the_snippet_for_hugging_face_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(
        SETTING + HUGGING_FACE + SECTIONS["Hugging Face `Trainer`"][1] + "gpt.load_state_dict(torch.load('model.pt'))",
        namespace,
    )


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("title", [title for title in LIBRARIES if title not in IN_ONE_PROCESS and "Face" not in title])
def test_the_snippets_of_dtrp_run_on_ranks(title: str, tmp_path: Path) -> None:
    imports, _, _, num_ranks = LIBRARIES[title]
    start(f"{SETTING}{imports}\nfrom dtrp.pipelining import ScheduleDTRP\n{SECTIONS[title][1]}", num_ranks, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("title", LIBRARIES)
def test_the_snippets_of_others_run(title: str, tmp_path: Path) -> None:
    imports, needed, num_ranks, _ = LIBRARIES[title]
    pytest.importorskip(needed)
    start(f"{SETTING}{imports}\n{SECTIONS[title][0]}", num_ranks, tmp_path)

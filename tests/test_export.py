"""`torch.export`: a program that is saved, and runs in a process that has nothing but `import dlrm_rs`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dlrm_rs
from dlrm_rs.jagged import JaggedTensor
from test_compile import FEATURES, dlrm, samples

# torch's own, while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

# Runs saved programs, each on its batch, in a process of its own.
RUN = """
import gc
import sys
import torch
import dlrm_rs
from dlrm_rs.operators import whose

for directory in sys.argv[1:]:
    program = torch.export.load(f"{{directory}}/program.pt2").module()
    dense, values, lengths, expected = torch.load(f"{{directory}}/batch.pt")
    features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync({features}, values, lengths)
    for _ in range(2):
        # Not the same bits: those of torch's Linear depend on where its input lies.
        torch.testing.assert_close(program(dense, features), expected)
    assert len(whose._BORROWED) == 1  # tables of the program's memory, made once
    del program
    gc.collect()
    assert len(whose._BORROWED) == 0
"""


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    """For batches of any size."""
    dense, features = samples(6)
    batch_size = Dim("batch_size")
    shapes = torch.export.ShapesCollection()
    shapes[dense] = {0: batch_size}
    shapes[features.values()] = {0: Dim("ids")}
    shapes[features.offsets()] = {0: len(FEATURES) * batch_size + 1}
    return torch.export.export(model, (dense, features), dynamic_shapes=shapes, strict=strict)


MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fp32": (None, ("fp32",) * 4),
    "fused": (dlrm_rs.optim.SGD(lr=0.1), ("fp32",) * 4),
    "every format": (None, ("bf16", "int8", "int2", "fp16")),
    "codebooks": (None, ("int4",) * 4),
}


def test_saved_programs_run_in_another_process(tmp_path: Path) -> None:
    directories = []
    for name, (optimizer, data_types) in MODELS.items():
        model = dlrm(optimizer, data_types=data_types).eval()
        if name == "codebooks":
            dlrm_rs.dequantize(model)
            torch.nn.init.normal_(model.embeddings.embedding_bags["t0"].weight)  # type: ignore[union-attr, index]
            dlrm_rs.quantize(model, "int4", method="codebook")
        for strict in (False, True) if name == "fp32" else (False,):
            directory = tmp_path / f"{name}-{strict}"
            directory.mkdir()
            directories.append(str(directory))
            with torch.no_grad():
                program = exported(model, strict)
                dense, features = samples(9)
                expected = model(dense, features)
                assert torch.equal(program.module()(dense, features), expected)
            torch.export.save(program, directory / "program.pt2")
            torch.save((dense, features.values(), features.lengths(), expected), directory / "batch.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN.format(features=FEATURES), *directories]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "weights_only" not in ran.stderr


def test_a_program_holds_parameters_and_buffers_under_the_models_names() -> None:
    model = dlrm(None, data_types=("fp32", "int8", "fp32", "fp32")).eval()
    with torch.no_grad():
        program = exported(model)
    names = {name for name in program.state_dict if name.startswith("embeddings.")}
    assert names == {f"embeddings.embedding_bags.t{i}.weight" for i in (0, 2, 3)}
    assert "embeddings.embedding_bags.t1.weight_codes" in program.constants
    assert torch.ops.dlrm_rs.lookup.default in {node.target for node in program.graph.nodes}


def test_a_program_of_ids_and_lengths() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dlrm = dlrm()

        def forward(self, dense: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
            features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(FEATURES, values, lengths)
            scores: Tensor = self.dlrm(dense, features)
            return scores

    model, batch_size = Model().eval(), Dim("batch_size")
    shapes = ({0: batch_size}, {0: Dim("ids")}, {0: len(FEATURES) * batch_size})
    dense, features = samples(6)
    inputs = (dense, features.values(), features.lengths())
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        dense, features = samples(9)
        inputs = (dense, features.values(), features.lengths())
        assert torch.equal(program.module()(*inputs), model(*inputs))


def test_a_collection_takes_and_gives_its_containers() -> None:
    model = dlrm().embeddings.eval()
    _, features = samples(6)
    _, others = samples(6)
    features.lengths(), others.offsets()  # however they were made and used
    values, weights, offsets, inverse_indices = {0: Dim("ids")}, None, None, None
    shapes = ([values, weights, offsets, inverse_indices],)
    program = torch.export.export(model, (features,), dynamic_shapes=shapes)
    pooled = program.module()(others)
    assert isinstance(pooled, dlrm_rs.KeyedTensor)
    assert pooled.keys() == FEATURES
    assert torch.equal(pooled["f2"], model(others)["f2"])


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 fails to run such programs, or to make them"
)
@pytest.mark.parametrize("strict", [False, True])
def test_features_in_another_order_and_rows_of_every_id(strict: bool, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = dlrm().embeddings
            self.rows = dlrm_rs.EmbeddingCollection([dlrm_rs.EmbeddingConfig("t", 50, 4, ["f3", "f1"])])

        def forward(self, features: dlrm_rs.KeyedJaggedTensor) -> tuple[Tensor, dict[str, JaggedTensor]]:
            return self.bags(features).values(), self.rows(features)

    model, keys = Model().eval(), FEATURES[::-1]
    one, other = (samples(size)[1] for size in (6, 9))
    given, others = (
        dlrm_rs.KeyedJaggedTensor(keys, features.values(), lengths=features.lengths()) for features in (one, other)
    )
    shapes = torch.export.ShapesCollection()
    shapes[given.values()] = {0: Dim("ids")}
    shapes[given.offsets()] = {0: len(keys) * Dim("batch_size") + 1}
    with torch.no_grad():
        program = torch.export.export(model, (given,), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        pooled, rows = torch.export.load(tmp_path / "program.pt2").module()(others)
        expected = model(others)
    assert torch.equal(pooled, expected[0])
    assert list(rows) == ["f3", "f1"]
    for name, wanted in expected[1].items():
        assert torch.equal(rows[name].values(), wanted.values())
        assert torch.equal(rows[name].offsets(), wanted.offsets())

"""`detect` under `torch.compile` and `torch.export`: one graph, in which loops stay loops, and the same detections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from detections import as_dict, assert_same_detections
from detectors import pair
from strategies import DEVICE
from tiny import tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastmrcnn
from fastmrcnn import DetectionBatch, ImageBatch, ops
from fastmrcnn.export import trace
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN

FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
KERNELS = {
    *("topk_anchors", "decode_proposals", "sorted_nms", "merge_levels"),
    *("multilevel_roi_align", "select_detections"),
}
ASKING = {"aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default"}
SIZES = ((60, 80), (50, 70))


class Case(NamedTuple):
    """A detector, a batch, and what it finds in it; in float64, too."""

    model: GeneralizedRCNN
    batch: ImageBatch
    found: dict[str, Tensor]
    exact: dict[str, Tensor]


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator).to(DEVICE) for size in sizes]


def case_of(model: GeneralizedRCNN, *sizes: tuple[int, int]) -> Case:
    batch, _, _ = model.transform.batch(images(*sizes), None)
    found = as_dict(model.detect(batch))
    exact = copy.deepcopy(model).double().detect(ImageBatch(batch.tensors.double(), batch.sizes))
    return Case(model, batch, found, as_dict(exact))


def detector(builder: str) -> GeneralizedRCNN:
    """With random weights that find something; images of `SIZES` become 64 high."""
    some = [image.cpu() for image in images(*SIZES)]
    model = pair(builder, some, **FEW, min_size=64, max_size=192)[1].to(DEVICE)
    assert isinstance(model, GeneralizedRCNN)
    return model


def small() -> GeneralizedRCNN:
    """Of few layers, since what is traced is the flow between them."""
    return tiny(fastmrcnn.MaskRCNN, maps=("0", "1"), **FEW).to(DEVICE)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and no gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])  # all parts
def case(request: pytest.FixtureRequest) -> Case:
    with torch.no_grad():
        return case_of(detector(request.param), *SIZES)


class Detect(nn.Module):
    """What of a detector is exported here."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: ImageBatch) -> DetectionBatch:
        return self.model.detect(images)


def calls(program: nn.Module) -> list[str]:
    """Names of all operators in a graph and the graphs that it calls."""
    graphs = [module.graph for module in program.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]


def test_compiles_without_graph_breaks(case: Case) -> None:
    """Some 5 s for each detector."""
    compiled = torch.compile(case.model.detect, fullgraph=True, backend="eager")
    assert_same_detections(as_dict(compiled(case.batch)), case.found, case.exact)


def test_exports(case: Case) -> None:
    program = torch.export.export(Detect(case.model), (case.batch,))
    found = program.module()(case.batch)
    assert isinstance(found, DetectionBatch)
    assert_same_detections(as_dict(found), case.found, case.exact)
    names = calls(program.graph_module)
    if DEVICE == "cpu":  # a process that runs it needs nothing of ours
        known = ("aten.", "torchvision.", "while_loop", "<built-in function getitem>")
        assert {name for name in names if not name.startswith(known)} == set()
        assert "while_loop" in names


def test_another_size_is_one_more_graph() -> None:
    model = small()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.detect, fullgraph=True, backend=backend)
    for sizes in (SIZES, ((80, 60), (50, 70)), SIZES):
        case = case_of(model, *sizes)
        assert case.found["count"].min() > 0
        assert_same_detections(as_dict(compiled(case.batch)), case.found, case.exact)
    assert backend.frame_count <= 2


def test_any_size_is_one_graph() -> None:
    """PyTorch computes with sizes that are formulas.  A map of a single cell would be another graph."""
    model = small()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.detect, fullgraph=True, backend=backend, dynamic=True)
    first = case_of(model, *SIZES)
    assert_same_detections(as_dict(compiled(first.batch)), first.found, first.exact)
    graphs = backend.frame_count
    second = case_of(model, (80, 60), (50, 70))
    assert_same_detections(as_dict(compiled(second.batch)), second.found, second.exact)
    assert backend.frame_count == graphs


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_graphs_for_a_gpu_call_kernels(builder: str) -> None:
    """Of a GPU that is not there, by both ways; and no operator among them asks it for a value or a shape."""
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with mode:
        with torch.device("cuda"):
            model = getattr(fastmrcnn, builder)(weights=None, weights_backbone=None).eval()
            batch = ImageBatch(torch.rand(2, 3, 128, 160), torch.full((2, 2), 120))
        anchors = model.rpn.anchor_generator
        anchors.cell_anchors = [cell.cpu() for cell in anchors.cell_anchors]  # as before the first call
        with tracing(TracingContext(mode)):
            program, about = trace(model, (120, 160), 2)
        compiled = torch.compile(model.detect, fullgraph=True, backend=keep)
        assert compiled(batch).boxes.device.type == "cuda"
    assert about["device"] == "cuda"
    assert {constant.device.type for constant in program.constants.values()} == {"cuda"}
    (graph,) = graphs
    assert not ASKING.intersection(calls(program.graph_module))
    for names in (calls(graph), calls(program.graph_module)):
        assert {name.split(".")[1] for name in names if name.startswith("fastmrcnn.")} == KERNELS


def boxes_of_segments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 200, 2, generator=generator) * 50
    boxes = torch.cat((corner, corner + 5 + torch.rand(3, 200, 2, generator=generator) * 20), dim=2)
    scores = torch.rand(3, 200, generator=generator)
    valid = torch.rand(3, 200, generator=generator) < torch.tensor([[0.9], [0.3], [0.0]])
    return boxes, scores, valid, torch.randint(2, (3, 200), generator=generator)


@pytest.mark.parametrize("presorted", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_suppression_is_a_loop(presorted: bool, grouped: bool) -> None:
    """In a graph, too, whatever the number of boxes, and wherever the last valid one is."""

    class Suppress(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
            chosen = groups if grouped else None
            return ops.padded_nms(boxes, scores, valid, 0.3, 200, groups=chosen, presorted=presorted, impl="reference")

    inputs = boxes_of_segments()
    expected = Suppress()(*inputs)
    assert expected[1].tolist()[2] == 0
    assert min(expected[1].tolist()[:2]) > 20
    program = torch.export.export(Suppress(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*inputs), expected, strict=True))
    assert len(calls(program.graph_module)) < 100
    none = tuple(x[:, :0] for x in inputs)
    found = torch.compile(Suppress(), fullgraph=True, backend="eager")(*none)
    assert all(torch.equal(a, b) for a, b in zip(found, Suppress()(*none), strict=True))


def test_keypoints_are_a_loop_unless_they_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.randn(4, 3, 14, 14, generator=generator)
    boxes = torch.tensor([[0.0, 0, 20, 30], [5, 5, 6, 6], [2, 3, 30.5, 9.25], [1, 1, 1, 1]])
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def find(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        return ops.heatmaps_to_keypoints(heatmaps, boxes, (32, 40), impl="reference")

    compiled = torch.compile(find, fullgraph=True, backend=keep)
    assert all(torch.equal(a, b) for a, b in zip(compiled(heatmaps), find(heatmaps), strict=True))
    with torch.enable_grad():
        heatmaps.requires_grad_()
        gradients = [torch.autograd.grad(run(heatmaps)[1].sum(), heatmaps)[0] for run in (compiled, find)]
    assert torch.equal(*gradients)
    assert ["while_loop" in calls(graph) for graph in graphs] == [True, False]

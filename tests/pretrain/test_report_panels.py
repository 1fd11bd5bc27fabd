"""What the report shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.pretrain.report_panels import panels, verdicts
from densedino.pretrain.run_data import read_run

if TYPE_CHECKING:
    from pathlib import Path


def test_everything_measured_has_its_chart(run_folder: Path) -> None:
    shown = {panel.title: [chart.title for chart in panel.charts] for panel in panels(read_run(run_folder))}
    assert shown["Does it learn?"] == ["k-NN accuracy", "Segmentation mIoU", "Effective rank", "Feature deviation"]
    assert shown["Do patches hold?"] == ["Drift", "Coherence", "Near and far patches", "CLS and patches"]
    assert shown["Losses"] == ["Total loss", "DINO loss", "Prototype entropy, DINO"]
    assert shown["Steps"] == ["Gradient norm, backbone", "Learning rate", "Images per second"]


def test_the_axis_is_the_whole_run_with_its_stages_and_the_reference(run_folder: Path) -> None:
    charts = [chart for panel in panels(read_run(run_folder)) for chart in panel.charts]
    assert {chart.span for chart in charts} == {(0.0, 1500.0)}
    assert {tuple(chart.stages) for chart in charts} == {(1000.0,)}
    assert {chart.marked for chart in charts if chart.title in ("Drift", "Segmentation mIoU")} == {600}


def test_the_verdicts_are_about_learning_patches_and_trouble(run_folder: Path) -> None:
    learning, patches, trouble = verdicts(read_run(run_folder))
    assert learning.sentence.startswith("It learns")
    assert "Gram anchoring is needed; take the teacher of about step 600" in patches.sentence
    assert trouble.sentence == (
        "1 logged step was not finite and changed nothing; 1 file could not be read and was replaced; 1 look failed."
    )


def test_a_run_that_has_just_begun_has_no_charts_and_calm_verdicts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = read_run(tmp_path)
    assert panels(run) == []
    assert [verdict.level for verdict in verdicts(run)] == ["unknown", "unknown", "good"]

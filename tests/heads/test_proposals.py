from __future__ import annotations

import torch

from densedino.heads.proposals import ProposalMaps, propose


def test_every_cell_of_every_level_proposes_one_box() -> None:
    padding = torch.zeros(1, 8, 10, dtype=torch.bool)
    padding[:, 6:] = True
    maps = ProposalMaps(4)(torch.randn(1, 4, 8, 10))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 20), (8, 10), (4, 5), (2, 2)]
    out = propose(maps, padding)
    assert out.boxes.shape == (1, 16 * 20 + 80 + 20 + 4, 4) and out.sizes.tolist() == [[160.0, 96.0]]
    assert out.boxes[0, 21].tolist() == [12.0, 12.0, 50.0, 50.0]
    nowhere = (out.boxes == 160.0).all(-1)
    assert (out.features[nowhere] == 0).all()
    assert nowhere[0, -4:].all(), "boxes of 400 pixels are larger than the image"
    below = (torch.arange(16) * 8 + 4 > 96)[:, None].expand(16, 20).flatten()
    assert nowhere[0, : 16 * 20][below].all()

"""Decoder cosines and clusters against hand-made dictionaries and the whole matrix."""

import networkx
import pytest
import torch

from sae.evaluation import geometry
from sae.evaluation.geometry import decoder_clusters, decoder_shares


def dictionary(rows) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.float32)


def test_hand_made_clusters():
    """Two copies of one row, a chain of three with steps of cosine 0.8, one that is alone, one that is opposite to it."""
    chain = [[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0.28, 0.96, 0, 0]]  # the ends have cosine 0.28
    rows = [[0, 0, 2, 0], *chain, [0, 0, 1, 0], [0, 0, 0, 5], [0, 0, 0, -1]]
    found = decoder_clusters(dictionary(rows), 0.7)
    assert found["clusters"] == 2
    assert found["sizes"] == {"2": 1, "3": 1}
    assert found["largest"] == [[1, 2, 3], [0, 4]]
    assert found["clustered_fraction"] == pytest.approx(5 / 7)
    assert found["nearest_cosine_max"] == pytest.approx(1)
    assert found["nearest_cosine_mean"] == pytest.approx((1 + 0.8 + 0.8 + 0.8 + 1 + 0 + 0) / 7, abs=1e-6)
    assert found["nearest_cosine_quantiles"]["0.5"] == pytest.approx(0.8)
    assert decoder_clusters(dictionary(rows), 0.9)["sizes"] == {"2": 1}


def test_blocks_give_what_the_whole_matrix_gives(monkeypatch):
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    cosines.fill_diagonal_(-1)
    graph = networkx.Graph()
    graph.add_nodes_from(range(300))
    graph.add_edges_from((cosines > 0.93).nonzero().tolist())
    sizes = sorted((len(c) for c in networkx.connected_components(graph) if len(c) > 1), reverse=True)
    assert len(sizes) > 5
    for block in (1 << 24, 300 * 7):
        monkeypatch.setattr(geometry, "_BLOCK", block)
        found = decoder_clusters(dictionary(rows), 0.93)
        assert [len(members) for members in found["largest"]] == sizes[:10]
        assert sum(int(size) * count for size, count in found["sizes"].items()) == sum(sizes)
        assert found["nearest_cosine_mean"] == pytest.approx(float(cosines.amax(1).mean()), abs=1e-5)


def test_a_dictionary_that_is_all_one_direction_is_one_cluster_and_one_latent_is_none(monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK", 64)
    assert decoder_clusters(dictionary(torch.ones(40, 3)), 0.7)["sizes"] == {"40": 1}
    alone = decoder_clusters(dictionary(torch.ones(1, 3)), 0.7)
    assert (alone["clusters"], alone["nearest_cosine_mean"], alone["nearest_cosine_max"]) == (0, None, None)
    dead = decoder_clusters(dictionary(torch.zeros(3, 3)), 0.7)
    assert (dead["clusters"], dead["nearest_cosine_max"]) == (0, 0.0)


def test_shares_of_a_crosscoders_hooks():
    """One latent of the first hook alone, one of both alike, one of norms 3 and 1, and one that has no decoder."""
    rows = dictionary([[3, 4, 0], [0, 2, -2], [0, 3, 1], [0, 0, 0]])
    shares = decoder_shares(rows, {"a": slice(0, 2), "b": slice(2, 3)})
    assert shares["a"]["mean"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert shares["b"]["mean"] == pytest.approx((0 + 0.5 + 0.25) / 3)
    assert shares["a"]["quantiles"]["0.5"] == pytest.approx(0.75)
    assert shares["a"]["histogram"] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert shares["b"]["histogram"] == [1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    nothing = decoder_shares(dictionary(torch.zeros(2, 3)), {"a": slice(0, 2), "b": slice(2, 3)})
    assert nothing["a"]["mean"] is None

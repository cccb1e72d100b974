"""The same seed gives the same numbers, another seed gives others."""

from conftest import read_rows


def test_same_seed_same_numbers(script, reference, reference_flags, train, tmp_path):
    train(script, "PointMaze-U", tmp_path, *reference_flags, "--save-every", 300)  # saving leaves no trace
    rows = read_rows(tmp_path)
    assert rows == read_rows(reference)
    assert [row["step"] for row in rows][:2] == ["285", "570"] and len(rows) > 2


def test_other_seed_other_numbers(script, reference, train, tmp_path):
    train(script, "PointMaze-U", tmp_path, "--seed", 2, "--total-steps", 285)
    other, first = read_rows(tmp_path)[0], read_rows(reference)[0]
    same = [name for name, value in other.items() if value == first[name]]
    assert "step" in same
    others = {"eval/final_distance", "worker/q", "worker/actor_loss", "manager/q", "worker/progress"}
    assert not others & set(same)

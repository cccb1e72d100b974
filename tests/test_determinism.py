"""The same seed gives the same numbers, another seed gives others."""

from conftest import REFERENCE, read_rows


def test_same_seed_same_numbers(script, reference, train, tmp_path):
    env, flags = REFERENCE
    train(script, env, tmp_path, *flags, "--save-every", 300)  # saving leaves no trace in the run
    rows = read_rows(tmp_path)
    assert rows == read_rows(reference)
    assert [row["step"] for row in rows] == ["250", "500", "750", "1000", "1030"]


def test_other_seed_other_numbers(script, reference, train, tmp_path):
    env, flags = REFERENCE
    train(script, env, tmp_path, *flags, "--seed", 2, "--total-steps", 250)
    other, first = read_rows(tmp_path)[0], read_rows(reference)[0]
    same = [name for name, value in other.items() if value == first[name]]
    assert not {"eval/return", "worker/q", "worker/actor_loss", "manager/q", "worker/progress"} & set(same)

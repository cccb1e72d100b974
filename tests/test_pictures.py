"""What evaluation shows: the picture from above, and films with the subgoal drawn in."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import aclg_gcmr
import cher
import hiro
from common_envs import make_env

torch.set_num_threads(1)


def level(answer):
    """A policy that always says the same."""
    answer = np.array(answer, np.float32)
    return SimpleNamespace(act=lambda obs, goal, explore: answer, limit=torch.ones(len(answer)))


@pytest.fixture
def watched(tmp_path):
    """One episode per goal of PointMaze-U, straight on: its recorder."""
    env = make_env("PointMaze-U", evaluate=True)
    args = hiro.Args(env="PointMaze-U", eval_episodes=1, eval_goals=(0.0, 8.0, 8.0, 0.0))
    recorder = hiro.Recorder(env, tmp_path, "step_000000100", landmarks=np.array([[4.0, 4.0, 0.3]]))
    hiro.evaluate(env, level((3.0, 1.0)), level((0.5, 0.0)), args, 0, recorder)
    return recorder


def test_paths_of_all_episodes(watched):
    assert [goal.tolist() for goal, _, _ in watched.paths] == [[0, 8], [8, 0]]
    for _, positions, targets in watched.paths:
        positions, targets = np.array(positions), np.array(targets)
        assert len(positions) == 500
        assert np.abs(positions[0]).max() < 0.2  # the start, with its noise
        assert positions[:, 0].max() > 5 and np.abs(positions[:, 1]).max() < 2.5
        # a subgoal every 10 steps, 3 m and 1 m from where the point was
        np.testing.assert_allclose(targets[0], positions[0] + (3, 1), atol=1e-5)
        expected = positions[::10] + (3, 1)
        moved = np.abs(np.diff(expected, axis=0)).max(1) > 1e-3  # at the wall the point rests
        assert 10 < len(targets) == 1 + moved.sum()


def test_the_picture_shows_walls_path_subgoals_landmarks_and_goal(watched):
    axes = watched.draw().axes[0]
    walls = {tuple(np.round(wall.get_xy(), 6)) for wall in axes.patches}
    assert (-2, 2) in walls and len(walls) == len(
        watched.env.maze.walls
    )  # the tongue's first cell: x, y >= (-2, 2)
    lines = {(line.get_marker(), line.get_color()): line.get_xydata() for line in axes.lines}
    assert {marker for marker, _ in lines} == {".", "None", "*", "x"}
    assert lines["x", "tab:green"].tolist() == [[4, 4]]
    assert lines["*", "tab:red"].tolist() == [[8, 0]]  # the last of both goals
    assert len(lines["None", "tab:blue"]) == 500


def test_the_picture_is_written_for_each_evaluation(watched):
    images = []
    watched.save(SimpleNamespace(add_figure=lambda *what: images.append(what)), 100)
    picture = imread(watched.folder / "pictures" / "step_000000100.png")
    assert picture.shape[0] > 200 and picture[..., :3].std() > 0.05
    assert images[0][0] == "eval/paths" and images[0][2] == 100


@pytest.mark.parametrize("env, count", [("AntMaze-Bottleneck", 2), ("AntGather", 4)])
def test_slabs_are_walls_too(tmp_path, env, count):
    """The gap of Bottleneck and the fence of AntGather are no cells of the map."""
    env = make_env(env, evaluate=True)
    patches = hiro.Recorder(env, tmp_path, "eval").draw().axes[0].patches
    drawn = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in patches}
    assert len(drawn) == len(env.maze.walls) + count
    if count == 2:  # x from 3.35 to 7.15 and 8.75 to 11.75, y 3.5 to 4.5
        assert any(np.allclose(box, (3.35, 3.5, 3.8, 1)) for box in drawn)
        assert any(np.allclose(box, (8.75, 3.5, 3, 1)) for box in drawn)


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
def test_without_a_gl_library_films_are_refused_at_once(module, monkeypatch, tmp_path):
    class Blind:
        def render(self):
            raise RuntimeError("cannot render on this machine")

    make = module.make_env
    monkeypatch.setattr(module, "make_env", lambda *a, evaluate=False, **k: Blind() if evaluate else make(*a))
    with pytest.raises(SystemExit, match="--capture-video: .*cannot render on this machine"):
        flags = dict(env="PointMaze-U", subgoal_space="xy", run_dir=str(tmp_path / "run"))
        module.main(module.Args(**flags, capture_video=True))
    assert not (tmp_path / "run").exists()


def test_no_goal_no_star(tmp_path):
    """AntGather has no goals."""
    env = make_env("AntGather", evaluate=True)
    recorder = hiro.Recorder(env, tmp_path, "eval")
    recorder.start(np.zeros(0), 0, film=False)
    recorder.add(np.zeros(30, np.float32), np.array([1.0, 2.0], np.float32))
    recorder.save()
    assert (tmp_path / "pictures" / "eval.png").exists()


def test_markers_follow_the_subgoal(watched):
    watched.start(np.array([0.0, 8.0]), 0, film=False)
    for x in range(30):
        watched.add(np.array([x, 0.0]), np.array([1.0, 2.0]))
    markers = watched.markers()
    assert markers[0]["pos"][:2] == (4, 4)  # the landmark
    assert [m["pos"][0] for m in markers[1:]] == [*range(11, 31)]  # 19 old ones and the present one
    assert markers[-1]["size"] > markers[-2]["size"] and markers[-1]["pos"][:2] == (30, 2)


def test_a_film_has_a_frame_per_step(tmp_path):
    imageio = pytest.importorskip("imageio.v3", reason="an extra: imageio[ffmpeg]")
    pytest.importorskip("imageio_ffmpeg")
    env = make_env("PointMaze-U", evaluate=True, render_mode="rgb_array", width=96, height=96)
    env.reset(seed=0, options={"goal": np.array([0.0, 8.0])})
    recorder = hiro.Recorder(env, tmp_path, "eval")
    recorder.start(np.array([0.0, 8.0]), 0, film=True)
    for _ in range(4):
        recorder.add(np.array([4.0, 4.0]), np.array([3.0, 0.0]))
    marked = env.render().astype(int)
    recorder.close_film()
    assert not env.markers and recorder.film is None
    assert (np.abs(marked - env.render()) > 60).any(-1).sum() > 3  # the subgoal was seen
    assert imageio.imread(tmp_path / "videos" / "eval_goal0.mp4").shape == (4, 96, 96, 3)


def test_without_an_encoder_films_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        hiro.parse_args(["--capture-video"])
    assert "imageio[ffmpeg]" in str(error.value)


@pytest.mark.parametrize("flags, films", [([], 0), (["--capture-video"], 2)])
def test_only_the_first_episode_of_each_goal_is_filmed(tmp_path, flags, films):
    env = make_env("PointMaze-U", evaluate=True)
    started = []
    recorder = SimpleNamespace(start=lambda *w, film: started.append(film), add=lambda *what: None)
    args = hiro.Args(eval_episodes=2, eval_goals=(0.0, 8.0, 8.0, 0.0), capture_video=bool(flags))
    hiro.evaluate(env, level((3.0, 1.0)), level((0.5, 0.0)), args, 0, recorder)
    assert started == ([True, False, True, False] if films else [False] * 4)


def test_a_folder_that_cannot_be_written_is_one_line(watched, tmp_path):
    (tmp_path / "file").write_text("in the way")
    watched.folder = tmp_path / "file"
    with pytest.raises(SystemExit) as error:
        watched.save()
    assert "cannot write" in str(error.value) and "--run-dir" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_subgoals_only_paths_are_drawn(watched):
    """cher.py --flat: what the manager says are torques, no places."""
    watched.paths.clear()
    watched.has_subgoals = False
    watched.start(np.array([0.0, 8.0]), 0, film=False)
    for x in range(3):
        watched.add(np.array([float(x), 0.0]), np.array([30.0, -30.0]))
    assert not watched.targets and len(watched.markers()) == 1  # the landmark
    places = [line.get_xydata() for line in watched.draw().axes[0].lines]
    assert max(np.abs(xy).max() for xy in places if len(xy)) < 10

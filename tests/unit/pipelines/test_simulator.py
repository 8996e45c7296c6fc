import pytest

from pipelines.simulator import Camera, CameraError, RtspServer, SimulatorClient, SimulatorDown, main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mount", "cam1=scene:x"], "scene:SEED"),
        (["--mount", "cam1"], "neither"),
        (["--mount", "cam1=missing.mp4"], "missing.mp4"),
        (["--mount", "=scene:1"], "empty"),
        (["--mount", "a=scene:1", "--mount", "a=scene:2", "--size", "64"], "taken"),
        (["--mount", "a=scene:1", "--size", "63"], "even"),
        (["--mount", "a=scene:1", "--size", "64", "--user", "ann", "--password-env", "NOT_SET"], "password"),
    ],
)
def test_wrong_arguments_are_said(arguments, said, capsys):
    assert main(arguments) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert said in errors


def test_urls_carry_no_password():
    server = RtspServer(port=8554)
    camera = Camera("scene:1", auth="basic", username="ann", password="secret")
    assert server.add("/yard/door/", camera) == "rtsp://127.0.0.1:8554/yard/door"
    assert "secret" not in repr(camera)
    with pytest.raises(CameraError, match="taken"):
        server.add("yard/door", camera)
    client = SimulatorClient("rtsp://ann:secret@127.0.0.1:9/door")
    assert client.url == "rtsp://127.0.0.1:9/door"
    with pytest.raises(SimulatorDown) as error:
        client.log()
    assert "secret" not in str(error.value)

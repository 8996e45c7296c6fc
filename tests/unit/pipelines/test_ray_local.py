"""Joining a cluster that is not there, without waiting for it."""

import socket

import pytest

from pipelines.ray_local import RayNotStarted, ray_session


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_not_there_is_told_at_once(form):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        pytest.raises(RayNotStarted, match=r"no Ray cluster answers at .*127.0.0.1.*refused"),
        ray_session(form.format(port)),
    ):
        pass

"""A server of the test's own."""

import threading

import pytest

from tests.ecore.paper.annotation.stub import Stub


@pytest.fixture
def stub():
    stub = Stub()
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()
    thread.join()

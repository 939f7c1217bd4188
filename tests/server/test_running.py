"""The server as a process: port, readiness, signals and shutdown."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.errors import InputError
from d2llm.server.running import listen, url_of
from running_server import Running, run
from waiting import PATIENCE, until


@pytest.fixture
def running() -> Iterator[Running]:
    """A server that the test may stop."""
    yield from run()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server shared by the module's tests; do not stop it."""
    yield from run()


# Port


def test_port_0_picks_a_free_port_and_reports_it(shared: Running):
    assert shared.port > 0
    assert shared.get("/health") == '{"status":"ready"}'


def test_a_port_in_use_is_an_error_that_names_the_option():
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127\.0\.0\.1 is in use; .*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "message"), [("no-such-host.invalid", "is unknown"), ("192.0.2.1", "is not an address of this machine")]
)
def test_unknown_or_foreign_hosts_are_an_error(host: str, message: str):
    with pytest.raises(InputError, match=message):
        listen(host, 0)


def test_addresses_are_formatted_as_urls():
    with listen("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        bound = listen("::1", 0)
    except InputError:
        pytest.skip("needs IPv6")
    with bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


# Readiness


def test_ready_is_printed_once_the_server_is_ready():
    server = Running(state="starting")
    assert server.get_when_listening("/health")  # it listens, but has not printed "ready"
    server.get("/become/ready")
    assert server.line() == "ready"
    server.process.terminate()
    assert server.end()[0] == 0


def test_a_failed_start_exits_with_the_reason():
    server = Running(state="starting")
    server.get_when_listening("/become/broken")
    status, output, errors = server.end()
    assert (status, output) == (1, "")  # never "ready"
    assert errors.splitlines()[-1] == "the student is not there"


# Shutdown


@pytest.mark.parametrize(
    ("number", "num_clients"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), pytest.param(signal.SIGTERM, 64, id="64")]
)
def test_a_signal_stops_it_after_all_accepted_requests_are_answered(running: Running, number: int, num_clients: int):
    responses: list[str] = []
    threads = [threading.Thread(target=lambda: responses.append(running.get("/signalled"))) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    assert [running.line() for _ in threads] == ["began"] * num_clients
    running.process.send_signal(number)
    for thread in threads:
        thread.join()
    status, output, _ = running.end()
    assert responses == ['"done"'] * num_clients
    assert (status, output) == (0, "ended\n")
    with pytest.raises(ConnectionRefusedError):
        running.get("/health")


def test_requests_that_outlast_the_shutdown_time_are_cut_off():
    server = Running(shutdown_seconds=1)
    assert server.line() == "ready"
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    connection.request("GET", f"/slow/{3 * PATIENCE}")
    assert server.line() == "began"
    server.process.terminate()
    assert server.end()[0] == 0


@pytest.mark.parametrize(("path", "shape"), [("/slow/1000", "error"), ("/stuck", "error")])
def test_what_outlasts_the_shutdown_time_gets_an_answer_and_does_not_keep_the_process(path: str, shape: str):
    server = Running(shutdown_seconds=1)
    assert server.line() == "ready"
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    connection.request("GET", path)
    assert server.line() == "began"
    began = time.monotonic()
    server.process.terminate()
    response = connection.getresponse()
    assert response.status == 503
    assert json.loads(response.read())[shape]["kind"] == "not_ready"
    assert response.headers["X-Request-ID"]
    status, _, errors = server.end()
    assert status == 0
    assert time.monotonic() - began < 30
    assert "Traceback" not in errors


def test_sighup_reloads_and_errors_are_only_logged(running: Running):
    for _ in range(2):
        running.process.send_signal(signal.SIGHUP)
        assert running.line() == "reloaded"
    assert running.get("/health")
    running.process.terminate()
    status, _, errors = running.end()
    assert status == 0
    assert errors.count("SIGHUP: the new version is broken") == 2


# Behaviour that only a real connection shows


def exchange(server: Running, request: bytes, *more: bytes) -> bytes:
    with server.connect() as connection:
        connection.sendall(request)
        for part in more:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):  # the server has responded and closed the connection
                break
        response = b""
        try:
            while part := connection.recv(65_536):
                response += part
        except ConnectionResetError:
            pass
        return response


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


def test_an_endless_body_is_refused_at_the_limit(shared: Running):
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    response = exchange(shared, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk)  # never terminated
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b'"kind":"too_large"' in response


def test_a_large_content_length_is_refused_before_the_body(shared: Running):
    response = exchange(shared, HEAD + b"Content-Length: 1000000000000\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in response.lower()


def test_responses_have_no_server_header(shared: Running):
    response = exchange(shared, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nserver:" not in response.lower()


def test_a_missing_host_header_is_refused(shared: Running):
    assert exchange(shared, b"GET /v1/passages/a HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_client_disconnect_is_logged_as_499(running: Running):
    with running.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 900\r\n\r\n{")
        until(running.in_flight, "the request")
    until(lambda: not running.in_flight(), "its end")
    running.process.terminate()
    errors = running.end()[2]
    assert "Traceback" not in errors
    assert "status=499" in next(line for line in errors.splitlines() if "route=/v1/search" in line)

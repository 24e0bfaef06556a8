"""What a child runs where no Prefect is wanted: a fast stand-in for `python -m prefect.engine`.

It reads PREFECT_API_URL and PREFECT__FLOW_RUN_ID, then does what the parameters of its flow run say:

    do         complete (default) | fail | exit | raise | cancel | sleep | nothing (not even Running)
    code       the exit code; by default what the engine of 3.8 ends with, and 3 for exit
    seconds    how long the flow takes
    print err  lists of lines for standard output and standard error
    env        names of variables to print as NAME=value, "cwd" and "argv" among them
    term       crash (default: report Crashed, die of TERM) | ignore | die (report nothing) | finish (go on)
    force      whether that Crashed is forced, as 3.x does and 2.20 does not (default true)
    control    speak the control session: a cancel intent before TERM ends in Cancelled and exit 0
    misbehave  [mode, argument...]: start misbehave.py with them and leave it running
    file       a path that gets one line per execution, so that executions can be counted
    message    of the Failed state, or of the exception
"""

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from urllib.parse import urlsplit

RUN_ID = os.environ.get("PREFECT__FLOW_RUN_ID", "")
EXIT_CODES = {"raise": 1, "exit": 3}


def call(method, path, body=None):
    """One request; a server that is away is asked again for a while, like the real engine does."""
    url = urlsplit(os.environ["PREFECT_API_URL"])
    headers = {"content-type": "application/json"}
    key, pair = os.environ.get("PREFECT_API_KEY"), os.environ.get("PREFECT_API_AUTH_STRING")
    if key or pair:
        headers["authorization"] = "Basic " + b64encode(pair.encode()).decode() if pair else f"Bearer {key}"
    deadline = time.monotonic() + float(os.environ.get("ENGINE_PATIENCE", "10"))
    while True:
        try:
            connection = http.client.HTTPConnection(url.netloc, timeout=10)
            text = None if body is None else json.dumps(body)
            connection.request(method, url.path.rstrip("/") + path, text, headers)
            answer = connection.getresponse()
            read = answer.read()
            if answer.status < 500:
                return json.loads(read) if answer.status < 400 and read else None
        except OSError:
            pass
        if time.monotonic() > deadline:
            sys.exit("engine: the API does not answer")
        time.sleep(0.05)


def propose(type, message=None, force=False, name=None):
    """Propose a state, waiting as often as told to; the answer, or None when the run is gone."""
    transition = os.urandom(16).hex()
    state = {"type": type, "name": name, "message": message, "state_details": {"transition_id": transition}}
    while True:
        answer = call("POST", f"/flow_runs/{RUN_ID}/set_state", {"state": state, "force": force})
        if not answer or answer["status"] != "WAIT":
            return answer
        time.sleep(answer["details"]["delay_seconds"])


class Control:
    """The engine's end of the control session: it acks an intent to cancel and remembers it."""

    def __init__(self):
        self.cancelled = False
        self.socket = socket.create_connection(("127.0.0.1", int(os.environ.pop("PREFECT__CONTROL_PORT"))))
        self.socket.sendall(os.environ.pop("PREFECT__CONTROL_TOKEN").encode() + b"\n" + b"\0PF\x02\x01")
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while byte := self.socket.recv(1):
            if byte == b"\0":
                self.socket.recv(4, socket.MSG_WAITALL)
            if byte == b"c":
                self.cancelled = True
                self.socket.sendall(b"a")


def on_term(ask, control):
    """What TERM does while the flow runs."""
    how = ask.get("term", "crash")
    if how in ("ignore", "die"):
        return signal.SIG_IGN if how == "ignore" else signal.SIG_DFL

    def end(number, frame):
        if how == "finish":
            return
        if control and control.cancelled:
            propose("CANCELLING", force=True)
            propose("CANCELLED", force=True)
            os._exit(0)
        propose("CRASHED", "Execution was terminated by SIGTERM", force=ask.get("force", True))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    return end


def flow(ask):
    """The user's code."""
    if ask.get("file"):
        with open(ask["file"], "a") as counted:
            counted.write(f"{os.getpid()} {RUN_ID}\n")
    for line in ask.get("print", ()):
        print(line, flush=True)
    for line in ask.get("err", ()):
        print(line, file=sys.stderr, flush=True)
    for name in ask.get("env", ()):
        shown = {"cwd": os.getcwd(), "argv": json.dumps(sys.argv)}.get(name, os.environ.get(name))
        print(f"{name}={shown}", flush=True)
    if ask.get("misbehave"):
        import subprocess  # only now: it would double the start of everybody else

        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "misbehave.py")
        subprocess.Popen([sys.executable, "-S", "-E", script, *map(str, ask["misbehave"])])
    end = time.monotonic() + float(ask.get("seconds", 600 if ask.get("do") == "sleep" else 0))
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


def main():
    """One flow run from Running to its end; the exit code."""
    run = call("GET", f"/flow_runs/{RUN_ID}")
    if run is None:
        print(f"engine: no flow run {RUN_ID!r}", file=sys.stderr)
        return 1
    ask = run["parameters"]
    do = ask.get("do", "complete")
    if do == "raise":
        raise RuntimeError(ask.get("message", "the flow cannot be loaded"))
    if do == "nothing":
        return ask.get("code", 0)
    control = Control() if ask.get("control") and "PREFECT__CONTROL_PORT" in os.environ else None
    signal.signal(signal.SIGTERM, on_term(ask, control))
    begun = propose("RUNNING")
    if not begun or begun["status"] != "ACCEPT":
        return 0
    flow(ask)
    if do in ("complete", "sleep"):
        propose("COMPLETED")
    elif do == "fail":
        propose("FAILED", ask.get("message", "the flow failed"))
    elif do == "cancel":
        propose("CANCELLED")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the real engine reports no crash of a flow that is over
    return ask.get("code", EXIT_CODES.get(do, 0))


if __name__ == "__main__":
    sys.exit(main())

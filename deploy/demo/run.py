"""``make demo``: start a server on the demo base, give it the committed variants, and say how to ask each."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from base import base_folder, cache_folder

HERE = Path(__file__).parent
QUESTIONS = {
    "smollm2": "What is the capital of France?",
    "scripture": "Tell me about the sea.",
    "python": "Write a function for this: Return the sum of the squares of a list.",
    "sentiment": "Is this review positive or negative? Answer in one word.\\n\\nA dull plot, but a joy to watch.",
}
PATIENCE_SECONDS = 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port

    refuse_taken(port)
    store = cache_folder() / "demo-store"
    command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base_folder())]
    options = ["--served-name", "smollm2", "--store", str(store), "--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen([*command, *options])
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        register_variants(url)
        print_questions(url)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def refuse_taken(port: int) -> None:
    """Another server would answer in place of the one that could not start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SystemExit(f"Port {port} is taken; stop what listens there, or: make demo PORT=8001") from error


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"The server ended with code {server.returncode}; its message is above.")
        try:
            if httpx.get(f"{url}/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"The server was not ready after {PATIENCE_SECONDS} s.")


def register_variants(url: str) -> None:
    """Push what the server does not have yet, the way any user would."""
    served = {model["id"] for model in httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]}
    for artifact in sorted((HERE / "variants").glob("*.safetensors")):
        if artifact.stem not in served:
            push = [sys.executable, "-m", "deltaserve.server.cli", "push", str(artifact), "--name", artifact.stem]
            profile = str(HERE / "profile.safetensors")
            subprocess.run([*push, "--url", url, "--profile", profile], check=True, stdout=subprocess.DEVNULL)


def print_questions(url: str) -> None:
    print("\nReady. Ask the base and its variants, all served from one copy of the base's weights:\n")
    for model, question in QUESTIONS.items():
        message = f'{{"role": "user", "content": "{question}"}}'
        body = f'{{"model": "{model}", "temperature": 0, "max_tokens": 60, "messages": [{message}]}}'
        print(f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n")
    print("Ctrl-C stops the server.", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

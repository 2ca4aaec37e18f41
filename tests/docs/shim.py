"""What pages find as `kvrag`: sends the command to the zygote, and ends as it ended.

    python -I -S shim.py SOCKET SERVERS ARGUMENT…

`kvrag serve` goes on behind this one's end, as in another terminal, once it has told its address;
its process id is added to the file SERVERS.
"""

import json
import os
import socket
import sys


def main(path, servers, *arguments):
    serves = "serve" in arguments
    reader, writer = os.pipe()
    log = os.open(servers + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as zygote:
        zygote.connect(path)
        request = {
            "argv": arguments, "cwd": os.getcwd(), "env": dict(os.environ), "session": False,
        }  # fmt: skip
        streams = [0, writer, log] if serves else [0, 1, 2]
        socket.send_fds(zygote, [json.dumps(request).encode()], streams)
        started = json.loads(zygote.recv(1000))
        if not serves:
            return json.loads(zygote.recv(1000) or b'{"code": 70}')["code"]
    with open(servers, "a") as file:
        file.write(f"{started['pid']}\n")
    os.close(writer)
    with open(reader) as told:
        address = told.readline()
    if not address:
        with open(servers + ".log") as lines:
            sys.stderr.write(lines.read())
        return 1
    sys.stdout.write(address)
    return 0


sys.exit(main(*sys.argv[1:]))

"""Uses UNIX sockets as the arguments say, and prints what happens."""
import errno, os, socket, sys, threading, time


def talk(path, data):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        sender = threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)))
        sender.start()
        answer = b""
        while part := s.recv(65536):
            answer += part
        sender.join()
        return answer


def attempt(path, kind=socket.SOCK_STREAM):
    """What connect(2) says, and what comes back."""
    with socket.socket(socket.AF_UNIX, kind) as s:
        try:
            s.connect(path)
            s.sendall(b"x")
            s.shutdown(socket.SHUT_WR)
            # The answer may come in several pieces.
            answer = b"".join(iter(lambda: s.recv(100), b""))
            return answer.decode() or "the connection has ended"
        except OSError as error:
            return errno.errorcode[error.errno]


def main():
    what, *args = sys.argv[1:]
    if what == "attempt":
        for path in args:
            print(attempt(path))
    elif what == "packets":
        print(attempt(args[0], socket.SOCK_SEQPACKET))
    elif what == "hold":
        s = socket.socket(socket.AF_UNIX)
        s.connect(args[0])
        s.sendall(b"x")
        time.sleep(1000)
    elif what == "much":
        data = os.urandom(3 << 20)
        answer = talk(args[0], data)
        print("equal" if answer.endswith(data) else f"{len(answer)} bytes")
    elif what == "many":
        results = []
        threads = [
            threading.Thread(target=lambda number=number: results.append(talk(args[0], b"%d" % number)))
            for number in range(40)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        answers = {answer.decode().split()[-1] for answer in results}
        print("all" if answers == {str(number) for number in range(40)} else sorted(answers))
    elif what == "own":
        server = socket.socket(socket.AF_UNIX)
        server.bind(args[0])
        server.listen()

        def serve():
            connection, _ = server.accept()
            connection.recv(1)
            connection.sendall(b"of the guest")

        threading.Thread(target=serve, daemon=True).start()
        # The names that the guest's kernel knows are looked up again after a second.
        os.listdir(os.path.dirname(args[0]))
        time.sleep(1.5)
        print(attempt(args[0]))


main()

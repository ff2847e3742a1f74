"""Kernels of the runs that tests start in their own process. Each is forked from a process that
has imported the libraries, which takes longer than most of these runs do. Where a test starts a
command of the package instead, the kernel is a new interpreter, as a user's is.
"""

import fcntl
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection  # hands any file to another process

from conftest import fork_server
from jupyter_client.provisioning import LocalProvisioner

ABOVE = 200  # numbers of files that nothing else has


def run_kernel(arguments, environment, folder, files):
    "Be what `python -m ipykernel_launcher` with these arguments is."
    from ipykernel import kernelapp

    os.setsid()
    os.chdir(folder)
    moved = {n: fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, ABOVE) for n, file in files.items()}
    for number, fd in moved.items():
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    inline = "--InteractiveShellApp.matplotlib=inline"  # IPython's own, were pyplot new here
    sys.argv = ["ipykernel_launcher", *arguments, inline]
    kernelapp.launch_new_instance()


class ForkedKernel:
    "The process of a kernel, as Jupyter uses a `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(self, command, env, cwd, files):  # number of a file for the kernel -> number here
        handed = {number: Connection(os.dup(fd)) for number, fd in files.items()}
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        self.process = fork_server().Process(target=run_kernel, args=(arguments, env, cwd, handed))
        self.process.start()
        self.pid, self.args = self.process.pid, command

    def poll(self):
        "The exit code; None while the kernel runs."
        return self.process.exitcode

    def wait(self, timeout=None):
        "The exit code, once the kernel has ended."
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def send_signal(self, number):
        "Send a signal."
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self):
        "End the kernel at once."
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        "Ask the kernel to end."
        self.send_signal(signal.SIGTERM)


class ForkedProvisioner(LocalProvisioner):
    "Starts the kernels of Jupyter."

    async def launch_kernel(self, cmd, *, env=None, cwd=None, pass_fds=(), **given):
        "Start one; returns how to reach it."
        files = {fd: fd for fd in pass_fds}
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = given.get(name)
            files[number] = number if stream is None else stream.fileno()
        with open(os.devnull) as nothing:
            files[0] = nothing.fileno()
            self.process = ForkedKernel(cmd, {**(env or os.environ)}, cwd or os.getcwd(), files)
        self.pid = self.pgid = self.process.pid
        return self.connection_info

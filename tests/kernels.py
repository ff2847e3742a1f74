"""Kernels of the runs that tests start in their own process. Each is forked from a process that
has imported the libraries, which takes longer than most of these runs do. Where a test starts a
command of the package instead, the kernel is a new interpreter, as a user's is. A process that
was forked itself, such as that of a chapter, asks the process of the tests for its kernels.
"""

import fcntl
import os
import signal
import subprocess
import sys
from functools import cache, partial
from importlib.metadata import EntryPoint
from multiprocessing import current_process
from multiprocessing.connection import Connection  # hands any file to another process
from multiprocessing.managers import BaseManager
from threading import Thread

from conftest import fork_server
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

ABOVE = 200  # numbers of files that nothing else has
FORKED = "forked-provisioner"  # how Jupyter knows the class below


def run_kernel(arguments, environment, folder, files, tests):
    "Be what `python -m ipykernel_launcher` with these arguments is."
    from ipykernel import kernelapp

    fork_kernels(tests)
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

    def __init__(self, command, env, cwd, files):  # number of a file for the kernel -> file
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        given = (arguments, env, cwd, files, tests_address())
        self.process = fork_server().Process(target=run_kernel, args=given)
        self.process.start()
        self.pid, self.args = self.process.pid, command

    def number(self):
        "The number of the process."
        return self.pid

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


class Tests(BaseManager):
    "The process of the tests, as a process that it forked reaches it."


Tests.register("ForkedKernel", ForkedKernel)


@cache
def tests_address():
    "Where this process answers as `Tests`."
    server = Tests(authkey=current_process().authkey).get_server()
    Thread(target=server.serve_forever, daemon=True).start()
    return server.address


class AskedKernel:
    "A `ForkedKernel` of the process of the tests."

    stdin = stdout = stderr = None

    def __init__(self, tests, command, env, cwd, files):
        there = Tests(tests, current_process().authkey)
        there.connect()
        self.kernel = there.ForkedKernel(command, env, cwd, files)
        self.pid, self.args = self.kernel.number(), command

    def __getattr__(self, name):
        return getattr(self.kernel, name)


class ForkedProvisioner(LocalProvisioner):
    "Starts the kernels of Jupyter."

    tests = None  # address of the process of the tests, in others

    async def launch_kernel(self, cmd, *, env=None, cwd=None, pass_fds=(), **given):
        "Start one; returns how to reach it."
        files = {fd: fd for fd in pass_fds}
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = given.get(name)
            files[number] = number if stream is None else stream.fileno()
        start = partial(AskedKernel, self.tests) if self.tests else ForkedKernel
        with open(os.devnull) as nothing:
            files[0] = nothing.fileno()
            handed = {number: Connection(os.dup(fd)) for number, fd in files.items()}
            self.process = start(cmd, {**(env or os.environ)}, cwd or os.getcwd(), handed)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def fork_kernels(tests=None):
    "Kernels that this process starts are forked, by the process of the tests at this address."
    ForkedProvisioner.tests = tests
    factory = KernelProvisionerFactory.instance()
    entry = EntryPoint(FORKED, "kernels:ForkedProvisioner", KernelProvisionerFactory.GROUP_NAME)
    factory.provisioners[FORKED] = entry
    factory.default_provisioner_name = FORKED

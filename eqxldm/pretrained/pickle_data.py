"""Pickles read as data: what they would have called is written down, and nothing is called.

A pickle is a program for a small stack machine that can call any function there is. Weights need a
dozen of its instructions. These are followed here; a global stays its name, a call stays
what it would have been.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from .layout import WeightsError

MOST = 10**6  # instructions; the largest published files have a tenth


class Global(NamedTuple):
    """A function or a class, by its name alone."""

    module: str
    name: str


class Call:
    """A call that was not made, and the state that its result would have been given."""

    def __init__(self, function: Any, arguments: Any):
        self.function, self.arguments = function, arguments
        self.state: Any = None


class Persistent(NamedTuple):
    """What the file keeps outside of the pickle, as it is described there."""

    about: Any


class _Mark:
    pass


_MARK = _Mark()
_PUSHED = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING "
    "SHORT_BINSTRING BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


def read_pickle(content: bytes | Any, source: str) -> Any:
    """What a pickle holds: dicts, lists, tuples, numbers, texts, bytes, and `Call`s of `Global`s.

    `content` is its bytes, or an open file, which is left after the pickle.

    **Raises** `WeightsError`, with `source` named, for an instruction that files of weights do not
    have, and for one that does not fit the stack.

    >>> import pickle
    >>> read_pickle(pickle.dumps({"a": [1, 2.5, None]}), "here")
    {'a': [1, 2.5, None]}
    >>> call = read_pickle(pickle.dumps(print.__self__.__import__), "here")
    >>> call
    Global(module='builtins', name='__import__')
    """
    try:
        return _Machine(source).run(content)
    except WeightsError:
        raise
    except Exception as error:  # a stack that is empty, a number that is none, an end that is early
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{source} is damaged: {reason}.") from error


class _Machine:
    def __init__(self, source: str):
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes | Any) -> Any:
        for count, (code, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST:
                raise WeightsError(f"{self.source} has more than {MOST} instructions.")
            if code.name == "STOP":
                return self.stack.pop()
            self._step(code.name, argument)
        raise WeightsError(f"{self.source} is damaged: its pickle has no end.")

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Global(str(module), str(attribute)))
        else:
            self._combine(name)

    def _combine(self, name: str) -> None:
        stack = self.stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            if len(stack) < size:
                raise WeightsError(f"{self.source} is damaged: a tuple of too few.")
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name == "LIST":
            stack.append(self._since_mark())
        elif name == "DICT":
            items = self._since_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            self._container(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._container(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            # The ordered dict of a state dict is a dict.
            ordered = function == Global("collections", "OrderedDict")
            stack.append(dict(*arguments) if ordered else Call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):
                stack[-1].state = state  # else the attributes of a dict: `_metadata`
        elif name == "BINPERSID":
            stack.append(Persistent(stack.pop()))
        else:
            raise WeightsError(
                f"{self.source} has the instruction {name}, which files of weights have not; "
                "nothing of it was run."
            )

    def _container(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise WeightsError(f"{self.source} is damaged: items for something that holds none.")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise WeightsError(f"{self.source} is damaged: a mark is missing.")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

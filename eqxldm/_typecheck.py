"""The functions of the package compare their arguments and their result with their annotations.

An import hook puts `check` on each function and dataclass. An array's annotation means what
jaxtyping says it does; beartype knows the others. A NumPy array or a number is taken where a JAX
array is asked for, and what does not fit is an `ArgumentError` of a few lines. Under `jit` all this
happens while tracing, so a compiled step costs nothing more.

jaxtyping has such a hook too. This one compares each argument once where that one does it three
times, prepares nothing before a function's first call, and leaves no frames in a traceback.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from jaxtyping import jaxtyped

from .argument_errors import (
    ArgumentError,
    as_array,
    explain_argument,
    explain_binding,
    explain_result,
    fits,
)


def check(target: Any) -> Any:
    """The function, or the dataclass with its `__init__`, comparing with its annotations."""
    if isinstance(target, type):
        # An `__init__` that is written out, or inherited, was decorated where it stands.
        if dataclasses.is_dataclass(target) and not hasattr(target.__init__, "__wrapped__"):
            target.__init__ = check(target.__init__)
        return target
    return _checked(target) if getattr(target, "__annotations__", None) else target


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    annotations: _Annotations | None = None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal annotations
        if annotations is None:  # not earlier: a class may name itself
            annotations = _Annotations(function)
        try:
            with jaxtyped("context"):  # in here a name of an axis means one size
                args, kwargs = annotations.accept(args, kwargs)
                try:
                    result = function(*args, **kwargs)
                except TypeError:  # which may come from the function, or from the call itself
                    annotations.check_binding(args, kwargs)
                    raise
                return annotations.accept_result(result)
        except Exception as error:
            error.__traceback__ = _without_checker(error.__traceback__)
            raise  # which adds no frame either

    return checked


class _Annotations:
    """What a function asks for, by the name of the parameter."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.signature = function, inspect.signature(function)
        hints = _hints(function)
        self.result = hints.pop("return", Any)
        self.hints = {name: hint for name, hint in hints.items() if hint is not Any}
        of_kind = lambda *kinds: [
            p.name for p in self.signature.parameters.values() if p.kind in kinds
        ]
        P = inspect.Parameter
        self.positional = of_kind(P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD)
        self.rest = next(iter(of_kind(P.VAR_POSITIONAL)), "")

    def accept(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """The arguments, converted where that makes them fit; an `ArgumentError` otherwise."""
        names = itertools.chain(self.positional, itertools.repeat(self.rest))
        try:
            taken = tuple(map(self._take, names, args))
            return taken, {name: self._take(name, value) for name, value in kwargs.items()}
        except _Misfit as misfit:
            name, value = misfit.args
        message = explain_argument(self.function, self.hints, name, value, args, kwargs)
        raise ArgumentError(message)

    def _take(self, name: str, value: Any) -> Any:
        hint = self.hints.get(name)
        if hint is None or fits(value, hint):
            return value
        array = as_array(value, hint)
        if array is not value and fits(array, hint):
            return array
        raise _Misfit(name, value)

    def accept_result(self, result: Any) -> Any:
        """The result; an `ArgumentError` if it is not what was promised."""
        if self.result is not Any and not fits(result, self.result):
            raise ArgumentError(explain_result(self.function, self.result, result))
        return result

    def check_binding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An `ArgumentError` if an argument is missing, unknown or one too many."""
        message = explain_binding(self.function, self.hints, args, kwargs)
        if message is not None:
            raise ArgumentError(message) from None


class _Misfit(Exception):
    """A parameter and the argument that does not fit it."""


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # a name in quotes that only an enclosing function knows
        return {k: v for k, v in function.__annotations__.items() if not isinstance(v, str)}


def _without_checker(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames of this file, which say nothing to who reads it."""
    entries: list[types.TracebackType] = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            entries.append(traceback)
        traceback = traceback.tb_next
    for entry in reversed(entries):
        entry.tb_next, traceback = traceback, entry
    return traceback


class _Loader(SourceFileLoader):
    """Loads a module with `check` on its functions and classes, cached beside the plain one."""

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__check__"] = check
        super().exec_module(module)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                decorator = ast.copy_location(ast.Name("__check__", ast.Load()), node)
                # Next to a function, which `jax.custom_jvp` and `property` then see checked; last
                # on a class, which `dataclass` has then made.
                at = 0 if isinstance(node, ast.ClassDef) else len(node.decorator_list)
                node.decorator_list.insert(at, decorator)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(_own_bytecode(path))

    def set_data(self, path: str, data: Any, **options: Any) -> None:
        super().set_data(_own_bytecode(path), data, **options)


def _own_bytecode(path: str) -> str:
    return path.removesuffix(".pyc") + ".checked1.pyc" if path.endswith(".pyc") else path


# Called many times for each request of a server, a tenth of whose time the checks took. What comes
# from outside they check themselves, by value.
UNCHECKED = {
    f"{__package__}.serving.{name}"
    for name in ("app", "events", "exchange", "image_answers", "metrics", "pictures", "requests")
}


class _Finder:
    """Finds the modules of the package, to be loaded by `_Loader`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{__package__}.") or name in UNCHECKED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Checks all modules of the package that are imported from now on."""
    sys.meta_path.insert(0, _Finder)  # pyright: ignore[reportArgumentType]

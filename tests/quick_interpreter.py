"""Triton's interpreter in half the time: at each call of a function within a kernel it patches its language anew, which
is once too often where the launch did so already."""

import functools
import inspect

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # no Triton here
    pass
else:

    @functools.cache
    def languages(function):
        return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]

    def call(self, *args, **kwargs):
        if any(module.range.__name__ != "_new_range" for module in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

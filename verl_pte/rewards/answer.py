r"""The final answer of a response: the last ``\boxed{...}``, or else what follows the last "Answer:".

Only text, no mathematics. A box that was never closed is no answer: the response was cut off.
"""

import re

_LONGEST = 1000  # characters of an answer; what is longer is no answer to these data sets' questions
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{]+)")
_ANSWER = re.compile(r"(?i)(?:^|[\s*#>])(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*([^\n]+)")


def final_answer(response: str) -> str | None:
    """The answer's text, without the box; None if there is none, or an empty or endless one."""
    boxes = list(_BOX.finditer(response))
    if boxes:
        last = boxes[-1]
        answer = _braced(response, last.end()) if last[1] == "{" else last[1]
    else:
        said = list(_ANSWER.finditer(response[-10 * _LONGEST :]))
        answer = said[-1][1].strip("*_ \t") if said else None
    if answer is None or not answer.strip() or len(answer) > _LONGEST:
        return None
    return answer.strip()


def _braced(text: str, start: int) -> str | None:
    """What stands before the brace that closes the one opened before `start`."""
    depth = 1
    for at in range(start, min(len(text), start + 2 * _LONGEST)):
        if text[at] in "{}" and (at == 0 or text[at - 1] != "\\"):
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
    return None

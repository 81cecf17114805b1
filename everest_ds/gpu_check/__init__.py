"""The check behind ``make gpu-check``: what one GPU does beside what the project says of it, in minutes.

:mod:`.check` runs the parts of :mod:`.parts` one after another, each in a process of its own (:mod:`.child`). A part is
a module with a function ``cases``; a case is a row of the page and is written as soon as it has ended.
"""

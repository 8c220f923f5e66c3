"""Documents that are made, not written: questions whose answers lie far back in the same document. docs/synthetic.md.

Two reports name such data. Qwen2.5-1M (arXiv 2501.15383): in pretraining, fill-in-the-middle, retrieval by keyword and
by position, and reordering of paragraphs, with no more detail than that. Olmo 3 (arXiv 2512.13961): two kinds of tasks
about frequent words of long PDFs, CWE and REX, worded by a language model. The tasks here need no model and are worded
by us; a file has a family of them. They share no key, value or sentence with the evaluation's questions.
"""

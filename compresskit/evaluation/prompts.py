"""Questions to which a model's answers are shown before and after compression. No torch.

They ask for what people see at once: facts, sums, code, rhyme, form, another language. Nothing scores the answers.
"""

from __future__ import annotations

PROMPTS = (
    "What is the capital of Norway, and what is it like?",
    "Explain in two short sentences why the sky is blue.",
    "Write a Python function that returns the largest number in a list.",
    "Name three good uses of an old and empty glass jar.",
    "Which is heavier: a cat, a horse or a whale?",
    "Write a short poem about rain on a tin roof.",
    "Translate to French: The library opens at nine.",
    "What is the difference between a virus and a bacterium?",
    "Rewrite politely: Send me the report now.",
    "List the steps to change a flat bicycle tyre.",
    "Of 7 apples I eat 2. How many remain?",
    "Give a title to a story about a lonely lighthouse.",
    "Say in one sentence how bees help plants bear fruit.",
    "What does the command grep do on a computer?",
    "Who wrote Don Quixote, and in which century?",
    "Continue: The old clock was silent, until one night",
    "Give the plural of mouse, of leaf and of child.",
    "What should I check before I buy a used car?",
    "How many degrees Fahrenheit are 20 degrees Celsius?",
    "Write a SQL query that counts the orders of each customer.",
)
"""For SmolLM2's tokenizer they are of few lengths, and questions of one length are answered together."""
PLAIN = "Question: {prompt}\nAnswer:"
"""How a model without a chat template is asked."""
ANSWER_TOKENS = 40
"""Of an answer, at most: enough to read two sentences."""

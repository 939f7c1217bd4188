"""Source code by function."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.fallbacks import fallback_counts
from d2llm.data import code_sections as module
from d2llm.data.code_sections import PARSED, code_sections, python_sections
from d2llm.data.file_contents import read_contents
from examples import examples

pytest.importorskip("tree_sitter", reason="pip install 'd2llm[documents]'")

# Each has a text between two functions, a class with a method and a comment right before it, and a function after it.
SOURCES = {
    ".js": """
import { a, b, c } from "./x";
export const sum = (x, y) => {
  return x + y;
};
let count = 0, limit = 10;
export class Stack {
  size = 0; items = [];

  // Adds one.
  push(item) {
    this.items.push(item);
  }
}
module.exports.peek = function () { return 1; };
""",
    ".ts": """
import { a, b, c } from "./x";
function sum(x: number, y: number): number {
  return x + y;
}
let count: number = 0;
export abstract class Stack<T> {
  private items: T[] = [];

  /** Adds one. */
  push(item: T): void {
    this.items.push(item);
  }
}
export const peek = memo(() => 1);
""",
    ".java": """
package a.b.c; import java.util.List;
interface Sum { static int sum(int x) {
  return x;
} }
// of the package
class Stack extends Base<T> {
  int size = 0;

  /** Adds one. */
  @Override
  public void push(T item) {
    size++;
  }
  class Inner { int peek() { return 1; } }
}
""",
    ".c": """
#include <stdio.h> // for all of them
static int *sum(int x, int y)
{
  return 0;
}
int count = 0, limit = 10;
#ifdef STACK
/* Adds one. */
void push(struct stack *s) { s->size++; }
#endif
int peek(void) { return 1; }
""",
    ".cpp": """
#include <vector> // for all of them
template <class T>
T sum(T x, T y) { return x + y; }
int count = 0, limit = 10;
namespace lists {
class Stack : public Base {
  std::vector<int> items; int size;
 public:
  // Adds one.
  void push(int item) { items.push_back(item); }
};
}  // namespace
int lists::Stack::peek() const { return 1; }
""",
    ".cs": """
using System.Collections.Generic; using System.Linq;
namespace Lists {
  class Sum { static int sum(int x) => x; }
  class Stack : Base<int> {
    List<int> items; int size;

    /// <remarks>Adds one.</remarks>
    [Obsolete] public void push(int item) {
      items.Add(item);
    }
    public int peek() { return 1; }
  }
}
""",
    ".go": """
package lists // of the module
func sum(x int, y int) int {
	return x + y
}
type Stack struct { items []int; size int }

// Adds one.
func (s *Stack) push(item int) {
	s.items = append(s.items, item)
}
func peek() int { return 1 }
""",
    ".rs": """
use std::fmt::{Display, Debug, Write};
fn sum(x: i32, y: i32) -> i32 {
    x + y
}
struct Stack { items: Vec<i32>, size: usize }
impl Stack {
    const LIMIT: usize = 10; const START: usize = 0;

    /// Adds one.
    #[inline]
    pub fn push(&mut self, item: i32) {
        self.items.push(item);
    }
}
fn peek() -> i32 { 1 }
""",
    ".rb": """
require "a"; require "b"
def sum(x, y)
  x + y
end
LIMIT, START = 10, 0
module Lists
  class Stack < Base
    attr_reader :items, :size

    # Adds one.
    def push(item)
      @items << item
    end

    def self.peek; end
  end
end
""",
    ".php": """
<?php use A\\B\\C;
function sum($x, $y) {
  return $x + $y;
}
$count = 0; $limit = 10;
class Stack extends Base {
  private $items = [1, 2, 3];

  /** Adds one. */
  public function push($item) {
    $this->items[] = $item;
  }
}
function peek() { return 1; }
""",
    ".kt": """
import a.b.C; import a.b.D
fun sum(x: Int, y: Int): Int {
  return x + y
}
val count = 0; val limit = 10
class Stack(val items: MutableList<Int>) {
  val size = 0; val start = 0

  // Adds one.
  fun push(item: Int) {
    items.add(item)
  }
}
fun peek() = 1
""",
    ".swift": """
import Foundation; import UIKit
func sum(x: Int, y: Int) -> Int {
  return x + y
}
let count = 0, limit = 10
class Stack: Base {
  var items: [Int] = []; var size = 0

  // Adds one.
  func push(item: Int) {
    items.append(item)
  }
}
func peek() -> Int { return 1 }
""",
    ".scala": """
import a.b.C; import a.b.D
object Sum { def sum(x: Int): Int = x }
case class Point(x: Int, y: Int)
class Stack(size: Int) extends Base {
  val items: List[Int] = List(1, 2)

  // Adds one.
  def push(item: Int): Unit = {
    items.add(item)
  }
}
object Peek { def peek = 1 }
""",
    ".lua": """
local a, b = require "a", require "b"
local function sum(x, y)
  return x + y
end
local count, limit = 0, 10
-- Adds one.
function Stack:push(item)
  table.insert(self.items, item)
end
M.peek = function() return 1 end
""",
    ".sh": """
set -e; export A=1 B=2
sum() {
  echo $(($1 + $2))
}
count=0; limit=10
# Adds one.
push() { items+=("$1"); }
function peek { echo 1; }
""",
}
HEADINGS = {  # of ``push``, where they are not a class and the method
    ".c": ("push",),
    ".cpp": ("lists", "Stack", "push"),
    ".cs": ("Lists", "Stack", "push"),
    ".go": ("Stack.push",),
    ".lua": ("Stack:push",),
    ".rb": ("Lists", "Stack", "push"),
    ".sh": ("push",),
}
SAME_LANGUAGE = {
    ".jsx": ".js",
    ".mjs": ".js",
    ".cjs": ".js",
    ".tsx": ".ts",
    ".mts": ".ts",
    ".cts": ".ts",
    ".h": ".cpp",
    ".cc": ".cpp",
    ".cxx": ".cpp",
    ".hh": ".cpp",
    ".hpp": ".cpp",
    ".hxx": ".cpp",
    ".kts": ".kt",
    ".bash": ".sh",
}


def lines_of(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("suffix", sorted(PARSED))
def test_functions_are_sections_under_their_classes(suffix):
    language = SAME_LANGUAGE.get(suffix, suffix)
    sections = list(code_sections(SOURCES[language], suffix))
    last_words = {re.split(r"\W", section.headings[-1])[-1]: section for section in sections if section.headings}
    assert {"sum", "push", "peek"} <= last_words.keys()
    push = last_words["push"]
    assert push.headings == HEADINGS.get(language, ("Stack", "push"))
    assert "Adds one." in push.text
    assert "sum" not in push.text
    assert "peek" not in push.text
    between = "\n".join(section.text for section in sections if section.headings not in (push.headings, ("sum",)))
    assert re.search("count|size|START|Point", between)
    assert lines_of("\n".join(section.text for section in sections)) == lines_of(SOURCES[language])


@settings(max_examples=examples(60))
@given(st.data())
def test_no_line_is_lost_and_none_invented(data):
    """Also in files that end anywhere, or of which lines are missing."""
    suffix = data.draw(st.sampled_from([*SOURCES, ".py"]))
    rows = (SOURCES.get(suffix) or SOURCES[".sh"]).split("\n")
    kept = data.draw(st.lists(st.sampled_from([*rows, "}", "{", "class A:", "  def f(): pass", "\x0c", "é\u2028é"])))
    text = "\n".join(kept)
    sections = python_sections(text) if suffix == ".py" else code_sections(text, suffix)
    assert lines_of("\n".join(section.text for section in sections)) == lines_of(text)


def test_python_by_function():
    function, method = "@cache\ndef f():\n    return 1", "    def g(self):\n        pass"
    text = f'"""Doc."""\nimport os\n\n{function}\n\nclass A:\n    x = 1\n\n{method}\n'
    parts = {section.headings: section.text for section in python_sections(text) if section.text}
    assert parts[()] == '"""Doc."""\nimport os'
    assert parts[("A",)] == "class A:\n    x = 1"
    assert parts[("A", "g")] == method
    assert parts[("f",)] == function
    assert [section.text for section in python_sections("def broken(:")] == ["def broken(:"]


def test_python_with_form_feeds_nested_classes_and_deep_nesting():
    text = "import os, sys\n\x0c\nclass A:\n    class B:\n        x, y = 1, 2\n        def f(self):\n            pass\n"
    assert [(section.headings, section.text.strip()) for section in python_sections(text)] == [
        ((), "import os, sys"),
        (("A", "B"), "class A:\n    class B:\n        x, y = 1, 2"),
        (("A", "B", "f"), "def f(self):\n            pass"),
    ]
    deep = "x = " + "-" * 100_000 + "1"
    assert [section.text for section in python_sections(deep)] == [deep]


def test_without_a_grammar_code_is_plain_text(tmp_path, monkeypatch):
    path = tmp_path / "a.go"
    path.write_text(SOURCES[".go"])
    assert len(read_contents(path).sections) > 3
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "tree_sitter_go" else name)
    module.missing_grammar.cache_clear()
    before = fallback_counts().get("source code by function", 0)
    (section,) = read_contents(path).sections
    assert section.text == SOURCES[".go"]
    assert fallback_counts()["source code by function"] == before + 1
    module.missing_grammar.cache_clear()

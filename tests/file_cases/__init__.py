"""Small files with the traits of real ones, each with the words that a reader of it must find."""

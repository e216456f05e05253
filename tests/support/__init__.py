"""What the tests share: ranks to run on, an oracle to compare with, and the table of cases."""

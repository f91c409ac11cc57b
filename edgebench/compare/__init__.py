"""The comparison of backends behind `benchmark.py`: run each several times, judge the differences, report them."""

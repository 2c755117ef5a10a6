"""``python -m launch.sweep``."""

from launch.sweep.sweep import main

if __name__ == '__main__':
    main()

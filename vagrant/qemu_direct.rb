# frozen_string_literal: true

# A Vagrant provider of this project's own, "qemu_direct": QEMU as a plain process, for places where neither
# libvirt nor VirtualBox runs. No daemon, no bridge, no root. The guest's network is QEMU's user-mode one, cut off
# from the outside; the only way in is SSH, forwarded from a free port of 127.0.0.1.
#
# A machine is what lies in its data directory: `box` (a link to what build-box made), `root.qcow2` and
# `spare.qcow2` (all that was written to its two disks since), `port`, `key`, and for a person `console.log`,
# `qemu.log` and `qemu.command`. Where `scripts/vm` put an `initrd.img` of the guest's own there, the machine starts with that, and
# has a third disk to read: what its root disk was at that moment, `root-N.qcow2`.

require "fileutils"
require "io/wait"
require "securerandom"
require "shellwords"
require "socket"
require "vagrant"

module QemuDirect
  class Error < Vagrant::Errors::VagrantError
    # Vagrant looks its messages up in a file of translations; these are their own.
    def initialize(sentence)
      @sentence = sentence
      super()
    end

    def error_message = @sentence
  end

  class Config < Vagrant.plugin("2", :config)
    attr_accessor :cpus, :memory
  end

  class Driver
    # The guest kernel's command line. One that panics ends, and so do its tests, instead of hanging. All after the first
    # line takes work off the processor that no test needs, and to emulate that is dear. With norandmaps a program lies
    # at the same addresses each time: what QEMU translated of it at one start serves the next, which halves the cost of
    # LVM's commands.
    WORDS = %w[
      console=ttyS0 quiet panic=-1 net.ifnames=0
      mitigations=off nokaslr init_on_alloc=0 audit=0 apparmor=0
      norandmaps lsm=yama hardened_usercopy=off randomize_kstack_offset=off
      nowatchdog transparent_hugepage=never cgroup_disable=memory
    ].freeze

    def initialize(machine)
      @machine = machine
    end

    def path(name) = @machine.data_dir.join(name).to_s

    def port = Integer(File.read(path("port")))

    # Makes the disks, the first upon a box that is built if it must be. Returns the machine's id.
    def create
      box = IO.popen([File.join(__dir__, "build-box")], &:read).strip
      raise Error, "The box could not be built; see above." unless $?.success?

      FileUtils.ln_sf(box, path("box"))
      # SSH takes a private key only from a file that nobody else may read.
      FileUtils.install(File.join(box, "key"), path("key"), mode: 0o600)
      %w[root spare].each { |disk| upon(File.join(box, "#{disk}.raw"), "raw", disk) }
      "blockbak-#{SecureRandom.hex(8)}"
    end

    def start
      keep if own?
      port = TCPServer.open("127.0.0.1", 0) { |server| server.addr[1] }
      File.write(path("port"), port.to_s)
      File.write(path("qemu.command"), "#{command(port).shelljoin}\n")
      # A process group of its own: Ctrl-C is for Vagrant, which then ends it in its own way.
      @child = Process.detach(Process.spawn(*command(port), chdir: @machine.data_dir.to_s, pgroup: true,
                                            in: "/dev/null", %i[out err] => [path("qemu.log"), "w"]))
    end

    # QEMU takes a connection before the guest listens, so only sshd's own greeting says that it is up.
    def wait(seconds, env)
      deadline = now + seconds
      until greeted?
        return if env[:interrupted]
        # Not by its arguments: a program that is only being loaded shows none yet.
        raise Error, "QEMU ended while the machine started.\n#{told}" unless @child.alive?
        raise Error, "The machine did not start within #{seconds} s.\n#{told}" if now > deadline

        sleep 0.2
      end
    end

    # The process is known by the id in its arguments: no file can be stale, and no other one is ever hit.
    def pid
      Dir["/proc/[0-9]*/cmdline"].each do |file|
        return Integer(file.split("/")[2]) if File.binread(file).split("\0")[1, 2] == ["-name", @machine.id]
      rescue SystemCallError
        next # it ended meanwhile
      end
      nil
    end

    def stop
      # QEMU closes its disk at TERM; it gets ten seconds for that.
      %w[TERM KILL].each do |signal|
        running = pid or return
        Process.kill(signal, running)
        100.times { pid ? sleep(0.1) : return }
      end
      raise Error, "QEMU (process #{pid}) does not end."
    rescue Errno::ESRCH
      nil
    end

    def delete
      stop
      FileUtils.rm_f(kept)
      FileUtils.rm_f(%w[box key root.qcow2 spare.qcow2 initrd.img port qemu.command qemu.log console.log].map { |name| path(name) })
    end

    def state
      return :not_created unless @machine.id

      pid ? :running : :poweroff
    end

    private

    # A disk that holds nothing but what is written from now on.
    def upon(base, format, disk)
      made = Vagrant::Util::Subprocess.execute(
        "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", base, path("#{disk}.qcow2")
      )
      raise Error, "qemu-img: #{made.stderr}" unless made.exit_code.zero?
    end

    # The root disk as it is now stays as it is; the machine goes on with another, upon it.
    def keep
      name = path("root-#{kept.size}.qcow2")
      File.rename(path("root.qcow2"), name)
      upon(name, "qcow2", "root")
    end

    def kept = Dir[path("root-*.qcow2")].sort_by { |name| Integer(name[/\d+(?=\.qcow2)/]) }

    def own? = File.exist?(path("initrd.img"))

    def command(port)
      config = @machine.provider_config
      # TCG is QEMU's emulation; a third quicker with a plain, old processor. A /dev/kvm in a place like this is
      # often one that never gets a guest going, so it is not even tried.
      ["qemu-system-x86_64", "-name", @machine.id, "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu",
       "Nehalem-v1", "-smp", config.cpus.to_s, "-m", config.memory.to_s,
       "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "file:console.log",
       # What a boot loader would do: where the guest has an initramfs of its own, it is the one to start with.
       "-kernel", "box/vmlinuz", "-initrd", own? ? "initrd.img" : "box/initrd.img",
       "-append", [*WORDS, *(%w[root=/dev/vda rw] if own?)].join(" "),
       "-device", "virtio-rng-pci",
       "-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:#{port}-:22",
       "-device", "virtio-net-pci,netdev=net,romfile=",
       # Nobody needs these disks after a power cut of the host, so the guest need not wait for them.
       *disk("root", "file=root.qcow2,format=qcow2,cache=unsafe,discard=unmap"),
       *disk("spare", "file=spare.qcow2,format=qcow2,cache=unsafe,discard=unmap"),
       *(own? ? disk("then", "file=#{kept.last},format=qcow2,readonly=on") : [])]
    end

    # What the guest sees of a disk's name is its serial number.
    def disk(name, about)
      ["-drive", "if=none,id=#{name},#{about}", "-device", "virtio-blk-pci,drive=#{name},serial=blockbak-#{name}"]
    end

    def greeted?
      Socket.tcp("127.0.0.1", port, connect_timeout: 2) do |connection|
        connection.wait_readable(3) && connection.read_nonblock(4) == "SSH-"
      end
    rescue SystemCallError, IOError
      false
    end

    def told
      %w[console.log qemu.log].map do |name|
        "--- #{path(name)}\n#{File.readlines(path(name)).last(20).join}"
      rescue SystemCallError
        ""
      end.join
    end

    def now = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  end

  # One small piece of what Vagrant does for a command.
  def self.step(&block)
    Class.new do
      define_method(:initialize) { |app, _env| @app = app }
      define_method(:call) do |env|
        block.call(env[:machine], env)
        @app.call(env)
      end
    end
  end

  Create = step { |machine, _| machine.id = machine.provider.driver.create }
  Start = step do |machine, env|
    machine.provider.driver.start
    env[:ui].info("QEMU runs; the console is in #{machine.provider.driver.path("console.log")}")
    machine.provider.driver.wait(machine.config.vm.boot_timeout, env)
  end
  Stop = step { |machine, _| machine.provider.driver.stop }
  Delete = step do |machine, _|
    machine.provider.driver.delete
    machine.id = nil
  end

  class Provider < Vagrant.plugin("2", :provider)
    attr_reader :driver

    def self.usable?(_raise = false) = true

    def initialize(machine)
      @driver = Driver.new(machine)
    end

    # The steps of a command, chosen by the state the machine is in; nil for what this provider cannot do.
    def action(name)
      return unless %i[up halt reload destroy ssh ssh_run].include?(name)

      state = driver.state
      builtin = Vagrant::Action::Builtin
      graceful = [builtin::Call, builtin::GracefulHalt, :poweroff, :running]
      asked = [builtin::Call, builtin::DestroyConfirm]
      raise Error, "The machine does not run: vagrant up." if %i[ssh ssh_run].include?(name) && state != :running

      Vagrant::Action::Builder.new.tap do |steps|
        steps.use(Create) if name == :up && state == :not_created
        steps.use(*graceful) { |_, rest| rest.use Stop } if %i[halt reload].include?(name) && state == :running
        steps.use(Start) if (name == :up && state != :running) || (name == :reload && state != :not_created)
        steps.use(*asked) { |env, rest| rest.use Delete if env[:result] } if name == :destroy && state != :not_created
        steps.use(builtin::SSHExec) if name == :ssh
        steps.use(builtin::SSHRun) if name == :ssh_run
      end
    end

    def ssh_info
      return unless driver.state == :running

      { host: "127.0.0.1", port: driver.port, username: "vagrant", private_key_path: [driver.path("key")] }
    end

    def state
      id = driver.state
      id = Vagrant::MachineState::NOT_CREATED_ID if id == :not_created
      Vagrant::MachineState.new(id, id.to_s.tr("_", " "), "It is run by QEMU, without libvirt or VirtualBox.")
    end
  end

  class Plugin < Vagrant.plugin("2")
    name "qemu_direct"
    config(:qemu_direct, :provider) { Config }
    provider(:qemu_direct, box_optional: true, defaultable: false) { Provider }
  end
end

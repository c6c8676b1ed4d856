import java.util.Arrays;

/**
 * Runs one of Beam's job servers whose cluster has Beam's jars itself: `java -cp JARS
 * JobServer.java DRIVER OPTION…`. Otherwise each job would first send all that is on the class
 * path, some 150 MB.
 */
public class JobServer {
  public static void main(String[] args) throws Exception {
    System.setProperty("java.class.path", "nothing-to-send.jar");
    String[] options = Arrays.copyOfRange(args, 1, args.length);
    Class.forName(args[0]).getMethod("main", String[].class).invoke(null, (Object) options);
  }
}
